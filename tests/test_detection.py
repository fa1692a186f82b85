"""Scores against annotated hallucinations: figures by hand, spans aligned, public data's rows."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import serving_samples
from cli_calls import eval_command
from fault_server import FaultServer
from PIL import Image

from fgaif.errors import DataError
from fgaif.eval.detection import (
    ANY,
    ScoredSpan,
    auroc,
    average_precision,
    best_of_n,
    calibration_error,
    f1_score,
    response_units,
    segment_label,
    segment_units,
)
from fgaif.eval.detection_data import GoldSpan, GoldText, read_gold, read_ranked
from fgaif.types import Json

__all__ = ["eval_command"]
Run = Callable[..., tuple[int, str, str]]


def test_figures_of_scores() -> None:
    """Of the pairs (.9, .4), (.9, .1), (.4, .4), (.4, .1) one ties: 3.5 of 4. Thresholds .9, .4 and
    .1 have precision 1, 2/3, 2/4 and gain half the recall, the other half, nothing."""
    scores, labels = [0.9, 0.4, 0.4, 0.1], [True, True, False, False]
    assert auroc(scores, labels) == 3.5 / 4
    assert average_precision(scores, labels) == pytest.approx(1 / 2 + 2 / 3 / 2)
    assert f1_score(scores, labels) == 2 / 3
    assert f1_score([0.1], [True]) == 0
    # Bins .1, .4 (one of two is hallucinated) and .9: (.1 + .2 + .1) / 4.
    assert calibration_error(scores, labels) == pytest.approx(0.4 / 4)
    assert math.isnan(auroc([0.5], [True]))
    assert math.isnan(average_precision([0.5], [False]))
    assert auroc([0.3, 0.3, 0.3], [True, False, False]) == 0.5


def span(
    start: int, end: int, hallucinated: bool | None = True, kind: str | None = None
) -> GoldSpan:
    return GoldSpan(start=start, end=end, hallucinated=hallucinated, kind=kind)


def scored(start: int, end: int, **scores: float) -> ScoredSpan:
    return ScoredSpan(start=start, end=end, scores=scores)


@pytest.mark.parametrize(
    ("spans", "kind", "label"),
    [
        ([span(10, 16)], ANY, True),  # half of a short span lies in it
        ([span(8, 16)], ANY, False),  # less than half does; the right one below decides
        ([span(0, 100)], ANY, True),  # it lies wholly in a long one
        ([span(12, 16, None)], ANY, False),
        ([span(12, 16, kind="object")], "object", True),
        ([span(12, 16, kind="object")], "relation", False),
        ([span(12, 16)], "object", False),  # of no known kind: not of this one
    ],
)
def test_a_segment_is_what_the_spans_under_it_are(
    spans: list[GoldSpan], kind: str, label: bool
) -> None:
    """The segment is [13, 33); a right span covers its end."""
    segment = scored(13, 33, any=0.5)
    assert segment_label(segment, [*spans, span(20, 40, False)], kind) is label
    assert segment_label(segment, [span(40, 50), span(12, 16, None)], kind) is None


def test_units_are_segments_and_responses() -> None:
    """Two claims of one response and one of another, each its own text."""
    texts = [
        GoldText(where="", group=group, image="i", text="x" * 10, spans=(span(0, 10, wrong),))
        for group, wrong in (("a", False), ("a", True), ("b", False))
    ]
    scores = [
        [scored(0, 10, object=0.2, relation=0.3)],
        [scored(0, 5, object=0.9), scored(5, 10, object=0.1)],
        [],
    ]
    segments = segment_units(texts, scores)
    assert [(u.group, u.hallucinated, u.score, u.place) for u in segments] == [
        ("a", False, 0.3, 0), ("a", True, 0.9, 0), ("a", True, 0.1, 5),
    ]  # fmt: skip
    assert [
        (u.group, u.hallucinated, u.score, u.length) for u in response_units(texts, scores)
    ] == [("a", True, 0.9, 20)]
    assert [u.score for u in segment_units(texts, scores, "relation")] == [0.3]


def test_the_best_of_n_is_that_which_people_prefer() -> None:
    found = best_of_n([0, 1, 0], [[2.0, 1.0], [1.0, 1.0], [0.0, 3.0]], [[9, 5], [3, 4], [7, 7]])
    assert found["accuracy"] == (1 + 0.5 + 0) / 3
    assert found["baselines"] == {
        "longest": (1 + 1 + 0.5) / 3, "shortest": (0 + 0 + 0.5) / 3, "chance": 0.5,
    }  # fmt: skip


def write(path: Path, rows: list[Json]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TEXT = "A dog on a red sofa. It sleeps."
MHAL = {
    "question": "What is there?", "image": "1.png", "response": TEXT,
    "annotations": [
        {"start": 0, "end": 5, "text": "A dog", "label": "ACCURATE"},
        {"start": 6, "end": 19, "text": TEXT[6:19], "label": "INACCURATE"},
        {"start": 21, "end": 31, "text": TEXT[21:], "label": "ANALYSIS"},
    ],
}  # fmt: skip


def test_rows_of_m_haldetect(tmp_path: Path) -> None:
    [text] = read_gold(write(tmp_path / "d.jsonl", [MHAL]), "mhaldetect")
    assert (text.text, text.image, text.prompt) == (TEXT, "1.png", "What is there?")
    assert [s.hallucinated for s in text.spans] == [False, True, None]
    wrong = MHAL | {"annotations": [{"start": 0, "end": 5, "text": "A cat", "label": "ACCURATE"}]}
    with pytest.raises(DataError, match="'A cat': expected what stands there, 'A dog'"):
        read_gold(write(tmp_path / "d.jsonl", [wrong]), "mhaldetect")
    wrong = MHAL | {"annotations": [{"start": 30, "end": 99, "label": "ACCURATE"}]}
    with pytest.raises(DataError, match="expected start and end within 31 characters"):
        read_gold(write(tmp_path / "d.jsonl", [wrong]), "mhaldetect")


def test_rows_of_mhalubench_and_hsa_dpo(tmp_path: Path) -> None:
    claims = {
        "image_path": "1.png", "claim_list": ["A dog.", "It is red."],
        "ref_claim_label": ["non-hallucination", "hallucination"],
    }  # fmt: skip
    whole = {"image_path": "2.png", "response": "A cat.", "label": "hallucination"}
    texts = read_gold(write(tmp_path / "m.jsonl", [claims, whole]), "mhalubench")
    assert [(t.group, t.text, t.spans[0].hallucinated) for t in texts] == [
        ("0", "A dog.", False), ("0", "It is red.", True), ("1", "A cat.", True),
    ]  # fmt: skip
    with pytest.raises(DataError, match="expected 2 labels"):
        read_gold(write(tmp_path / "m.jsonl", [claims | {"ref_claim_label": ["x"]}]), "mhalubench")

    def row(found: str) -> Json:
        asked = "<image>\nDescription to Assess:\nA red dog."
        return {"id": 1, "image": "1.png", "conversations": [{"value": asked}, {"value": found}]}

    tags = "Tags:\n<attribute>\n1 . It is brown\nScores:\n<attribute>\n1 . red: Minor (1 point)"
    rows = [row("NO HALLUCINATION"), row(tags)]
    right, wrong = read_gold(write(tmp_path / "h.jsonl", rows), "hsa")
    assert right.text == "A red dog."
    assert not any(s.hallucinated for s in right.spans)
    assert [s.kind for s in wrong.spans if s.hallucinated] == ["attribute"]
    with pytest.raises(DataError, match="expected NO HALLUCINATION, or tags"):
        read_gold(write(tmp_path / "h.jsonl", [row("Perhaps.")]), "hsa")


def test_spans_of_a_kind_leave_the_rest_right(tmp_path: Path) -> None:
    annotations = [{"start": 11, "end": 14, "type": "Relationship"}]
    row = {"image": "1.png", "response": TEXT, "annotations": annotations}
    [text] = read_gold(write(tmp_path / "s.jsonl", [row]), "spans")
    assert [(s.start, s.end, s.hallucinated, s.kind) for s in text.spans] == [
        (0, 11, False, None), (11, 14, True, "relation"), (14, 31, False, None),
    ]  # fmt: skip


def ranked(source: str, ranks: list[int]) -> Json:
    return {
        "id": "x", "query": "What?", "response": ["A dog.", "A big cat."], "image": "1.png",
        "human_ranking": ranks, "query_source": source,
    }  # fmt: skip


def test_ranked_responses(run: Run, tmp_path: Path) -> None:
    """Scores of the second question are equal; the third is not about hallucination."""
    rows = [ranked("POVID", [0, 1]), ranked("RLAIF-V", [1, 0]), ranked("MMMU-Pro", [0, 1])]
    data = write(tmp_path / "r.jsonl", rows)
    assert [pair.preferred for pair in read_ranked(data)] == [0, 1, 0]
    wholes = [(1.0, 0.0), (2.0, 2.0)]
    scores = [
        {"id": n, "texts": [{"segments": [], "whole": whole} for whole in pair]}
        for n, pair in enumerate(wholes)
    ]
    call = ("rewards", "--data", data, "--form", "vlrewardbench")
    given = write(tmp_path / "s.jsonl", scores)
    code, out, err = run(*call, "--scores", given, "--json")
    tree = json.loads(out)
    assert (code, tree["best_of_n"]["accuracy"], tree["best_of_n"]["questions"]) == (0, 0.75, 2), (
        err
    )
    assert tree["sources"]["POVID"]["baselines"]["longest"] == 0
    code, _, err = run(*call, "--scores", given, "--all-sources")
    assert code == 0
    with pytest.raises(DataError, match="expected ranks 0 to 1, one for each response"):
        read_ranked(write(data, [ranked("POVID", [1, 1])]))
    write(data, [ranked("MMMU-Pro", [0, 1])])
    code, _, err = run(*call, "--scores", given)
    assert (code, "no question is about hallucination (query_source: MMMU-Pro)" in err) == (2, True)


def test_another_tools_scores_are_evaluated(run: Run, tmp_path: Path) -> None:
    """Segments: the dog and its sofa (wrong), and the sleeping, which is analysis."""
    right = MHAL | {"annotations": [{"start": 0, "end": 20, "label": "ACCURATE"}]}
    data = write(tmp_path / "d.json", [MHAL, right])
    segments = [
        {"start": 0, "end": 21, "scores": {"object": 0.8}},
        {"start": 21, "end": 31, "scores": {"object": 0.9}},
    ]
    low = [segments[0] | {"scores": {"object": 0.3}}, segments[1]]
    scores = [{"id": n, "texts": [{"segments": s}]} for n, s in enumerate((segments, low))]
    given = write(tmp_path / "s.jsonl", scores)
    call = ("rewards", "--data", data, "--form", "mhaldetect", "--scores", given)
    code, out, err = run(*call, "--json", "--out", tmp_path / "o")
    tree = json.loads(out)
    assert code == 0, err
    assert tree["segment"][ANY]["auroc"]["value"] == 1
    assert (tree["segment"][ANY]["units"], tree["segment"][ANY]["hallucinated"]) == (2, 0.5)
    assert tree["segment"][ANY]["baselines"]["length"]["auroc"] == 0.5
    assert tree["response"][ANY]["auroc"]["value"] == 0.5  # both have a segment of .9
    assert json.loads((tmp_path / "o/rewards.json").read_text()) == tree
    assert len((tmp_path / "o/scores.jsonl").read_text().splitlines()) == 2
    out = run(*call)[1]
    assert "segment: any (2)" in out
    assert "[1.000, 1.000]" in out
    segments[0]["scores"] = {"object": 1.5}
    write(given, [{"id": 0, "texts": [{"segments": segments}]}])
    code, _, err = run(*call)
    assert (code, "scores are probabilities" in err) == (2, True)


def test_one_scorer_is_needed(run: Run, tmp_path: Path) -> None:
    data = write(tmp_path / "d.json", [MHAL])
    call = ("rewards", "--data", data, "--form", "mhaldetect")
    code, _, err = run(*call)
    assert (code, "one of --rewards DIR, --judge NAME and --scores FILE" in err) == (2, True)
    code, _, err = run(*call, "--rewards", tmp_path)
    assert (code, "needs --images" in err) == (2, True)


def test_trained_reward_models_are_scored(run: Run, tmp_path: Path, tiny_llava_dir: Path) -> None:
    rewards = serving_samples.write_rewards(tiny_llava_dir, tmp_path / "rewards")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "1.png")
    annotations = [{"start": 0, "end": 14, "kind": "object"}]
    text = "There is a dog. There is a moon."
    rows = [
        {"image": name, "response": text, "annotations": found}
        for name, found in (("1.png", annotations), ("1.png", []), ("2.png", []))
    ]
    data = write(tmp_path / "d.jsonl", rows)
    code, out, err = run(
        "rewards", "--data", data, "--form", "spans", "--rewards", rewards, "--images", tmp_path,
        "--json",
    )  # fmt: skip
    tree = json.loads(out)
    assert code == 0, err
    assert tree["counts"] == {"images_unusable": 1, "texts_without_score": 1}
    assert tree["segment"]["object"]["units"] == 4
    assert tree["segment"]["object"]["hallucinated"] == 0.25
    assert tree["response"]["object"]["auroc"]["value"] == 0.5  # the same text twice


def test_a_judge_is_scored_by_what_it_says_of_sub_sentences(run: Run, tmp_path: Path) -> None:
    """It says no to the sofa and nothing readable of the rest of the second response."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "1.png")
    texts = ["A dog sits on a red sofa.", "A small cat lies on a mat. Two birds fly in the sky."]
    rows = [
        {"image_path": "1.png", "response": text, "label": label}
        for text, label in zip(texts, ("hallucination", "non-hallucination"), strict=True)
    ]

    def reply(body: Json) -> str:
        text = str(body["messages"])
        return "no" if "sofa" in text else "yes" if "cat" in text else "hm"

    with FaultServer(reply) as server:
        code, out, err = run(
            "rewards", "--data", write(tmp_path / "d.jsonl", rows), "--form", "mhalubench",
            "--images", tmp_path, "--judge-model", "j", "--judge-url", server.base_url, "--json",
        )  # fmt: skip
    tree = json.loads(out)
    assert code == 0, err
    assert tree["response"][ANY]["auroc"]["value"] == 1
    assert tree["counts"]["segments_without_verdict"] == 1
    assert tree["provenance"]["prompt"].startswith("statement")
