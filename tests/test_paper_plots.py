"""Plots of results: what they show by hand, what is drawn of which benchmark, and the command."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_calls import eval_command

from fgaif.eval.answers import Caption
from fgaif.eval.benchmarks.chair import score_chair
from fgaif.eval.paper_plots import curve, draw_all, said_in_order
from fgaif.eval.scored import Scored
from fgaif.eval.vocabulary import Vocabulary
from fgaif.types import Json

__all__ = ["eval_command"]
Run = Callable[..., tuple[int, str, str]]
WORDS = Vocabulary.from_nouns(["dog", "cat", "moon"])


def chair(*texts: str) -> Scored:
    """Captions of images that show a dog and a cat; a moon is wrong."""
    captions = [
        Caption(where="", id=str(n), image=str(n), text=text) for n, text in enumerate(texts)
    ]
    return score_chair(captions, {str(n): {"dog", "cat"} for n in range(len(texts))}, WORDS)


def test_errors_by_place_and_by_count() -> None:
    """Two captions name a dog, then a moon; of the fifths they fall into the second and fourth.
    The third names a moon alone, in the middle. Each is one sub-sentence."""
    scored = chair("A dog and a moon.", "A dog and a moon.", "A moon.")
    place = curve(scored, "place")
    assert place["said"].tolist() == [0, 2, 1, 2, 0]
    assert place["wrong"][1:4].tolist() == [0, 1, 1]
    assert math.isnan(place["wrong"][0])
    assert place["per_answer"][1] == pytest.approx(2 / 3)
    count = curve(scored, "count")
    assert count["said"].tolist() == [5, 0, 0, 0, 0]
    assert count["wrong"][0] == 3 / 5
    assert count["low"][0] < 3 / 5 < count["high"][0]
    assert count["per_answer"][0] == 5 / 3


@pytest.mark.parametrize(
    ("item", "wrong"),
    [
        ({"named": ["a", "b", "a"], "hallucinated": ["b"]}, [False, True, False]),
        ({"facts": {"x": True, "y": False, "z": None}}, [False, True]),
        ({"descriptive": [{"faithful": f} for f in (True, None, False)]}, [False, True]),
        ({"answer": "Yes"}, []),
    ],
)  # fmt: skip
def test_things_said_are_objects_facts_or_sub_sentences(item: Json, wrong: list[bool]) -> None:
    assert said_in_order(item) == wrong


def test_errors_are_drawn_beside_what_is_said() -> None:
    models = {"base": chair("A dog and a moon.", "A cat."), "mine": chair("A dog.", "A cat.")}
    figures = draw_all(models)
    assert list(figures) == [
        "chair_errors", "chair_precision_recall", "chair_place", "chair_count",
    ]  # fmt: skip
    panels = figures["chair_errors"].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["errors", *["what is said"] * 3]
    labels = [[tick.get_text() for tick in axes.get_xticklabels()] for axes in panels]
    assert labels == [["CHAIR_i", "CHAIR_s"], ["recall"], ["objects"], ["length"]]
    heights = [bar.get_height() for bar in panels[0].patches]
    assert heights == pytest.approx([1 / 3, 1 / 2, 0, 0])
    assert [text.get_text() for text in panels[-1].get_legend().get_texts()] == ["base", "mine"]
    (axes,) = figures["chair_precision_recall"].axes
    assert axes.get_ylabel() == "1 − CHAIR_i"
    points = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "o"]
    assert points == [pytest.approx([2 / 4, 2 / 3]), pytest.approx([2 / 4, 1])]


def test_groups_are_drawn_where_there_are_some() -> None:
    from fgaif.eval.amber_files import AmberAnswer, AmberRow, AmberWords
    from fgaif.eval.benchmarks.amber import score_amber

    rows = {"1": AmberRow(part="existence", no=True), "2": AmberRow(part="relation", no=True)}
    answers = {i: AmberAnswer(text=text) for i, text in (("1", "No"), ("2", "Yes"))}
    scored = score_amber(rows, answers, AmberWords(synonyms={}))
    figures = draw_all({"m": scored})
    assert list(figures) == ["amber_groups"]  # no descriptions, no errors and no order
    (axes,) = figures["amber_groups"].axes
    assert axes.get_title(loc="left") == "F1"
    assert {t.get_text() for t in axes.get_xticklabels()} >= {"existence", "relation"}
    assert sorted(np.unique([bar.get_height() for bar in axes.patches])) == [0, 1]


def test_the_command_draws_what_all_folders_hold(run: Run, tmp_path: Path) -> None:
    questions = [
        {"question_id": n, "image": f"{n}.png", "text": f"Is it {n}?", "label": "yes"}
        for n in range(2)
    ]
    Path("coco_pope_random.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    Path("coco_pope_popular.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    answers = [{"question_id": n, "text": "Yes"} for n in range(2)]
    splits: list[str] = []
    for split in ("random", "popular"):
        Path(f"{split}.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
        splits += ["--questions", f"coco_pope_{split}.jsonl", "--answers", f"{split}.jsonl"]
    assert run("pope", *splits, "--out", "o")[0] == 0
    code, out, err = run("--plots", "o")
    assert code == 0, err
    assert out.split() == ["o/plots/pope_groups.pdf", "o/plots/pope_groups.png"]
    assert (tmp_path / "o/plots/pope_groups.pdf").read_bytes().startswith(b"%PDF")
    code, _, err = run("--plots", "o", "--plots", "x/o")
    assert (code, "two folders are named alike" in err) == (2, True)
