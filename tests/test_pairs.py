"""Pairs of scored responses: pure functions, the files, and `fgaif pairs` over a run folder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_store import labeled_response
from typer.testing import CliRunner

from cluster.cli.main import app
from fgaif.baselines.files import PairsCard, check_base, read_preferences, read_sft, write_pairs
from fgaif.baselines.pairs import ScoredText, make_pairs, require_pairs, score_labels
from fgaif.config import RewardShapeConfig
from fgaif.data.images import image_ref
from fgaif.data.scenes.files import write_split
from fgaif.errors import ConfigError, DataError
from fgaif.feedback.store import label_store
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.reward.checkpoint import checkpoint_digest
from fgaif.types import ImageRef, LabeledResponse, Prompt, Verdict

IMAGE = ImageRef(path="/photo.png", sha256="a" * 64)
CLASSES = {"good": [[1, 1, 1]] * 4, "bad": [[2, 1, 2]] + [[1, 1, 1]] * 3, "unknown": [[-1] * 3] * 4}


def text(words: str, score: float | None, *, prompt: str = "p", finish: str = "stop") -> ScoredText:
    asked = Prompt(id=prompt, image=IMAGE, text=prompt)
    return ScoredText(prompt=asked, text=words, score=score, finish=finish)  # type: ignore[arg-type]


def pieces(pairing: object) -> list[tuple[str, str]]:
    return [(pair.chosen.text, pair.rejected.text) for pair in pairing.pairs]  # type: ignore[attr-defined]


def test_the_best_is_paired_with_the_worst() -> None:
    found = make_pairs([text("a", 1), text("b", 3), text("c", -2), text("d", 0, prompt="q")])
    assert pieces(found) == [("b", "c")]
    assert [item.text for item in found.best] == ["b", "d"]
    assert found.counts["prompts"] == 2
    assert found.counts["single"] == 1


def test_more_pairs_come_by_their_difference_and_none_is_too_near() -> None:
    scored = [text("a", 0.0), text("b", 1.0), text("c", 3.0)]
    assert pieces(make_pairs(scored, per_prompt=3)) == [("c", "a"), ("c", "b"), ("b", "a")]
    assert pieces(make_pairs(scored, per_prompt=3, least=1.0)) == [("c", "a"), ("c", "b")]
    drawn = {tuple(pieces(make_pairs(scored, draw=seed))) for seed in range(20)}
    assert drawn == {(pair,) for pair in (("c", "a"), ("c", "b"), ("b", "a"))}


def test_ties_and_what_cannot_be_used_are_counted() -> None:
    found = make_pairs(
        [
            *(text("a", 1), text("b", 1)),  # a tie
            *(text("a", 2, prompt="q"), text("a", 2, prompt="q"), text("c", None, prompt="q")),
            *(text("a", 1, prompt="r"), text("b", 2, prompt="r", finish="length")),
        ]
    )
    assert found.pairs == ()
    assert found.counts == {
        "prompts": 3, "single": 2, "ties": 1, "unjudged": 1, "unfinished": 1, "repeated": 1
    }  # fmt: skip
    assert found.summary() == (
        "0 pairs of 3 prompts; left out: 2 with fewer than two usable responses, "
        "1 with equal scores, 1 responses without a score, 1 responses cut at the length limit, "
        "1 repeated responses"
    )
    with pytest.raises(DataError, match=r"here: no pairs: 0 pairs .* do that"):
        require_pairs(found, "here", "do that")


def labelled(name: str, words: str = "") -> LabeledResponse:
    item = labeled_response(name="prompt")
    response = replace(item.response, text=f"{item.response.text[:-1]}{words}{name[0]}")
    return replace(item, response=response, labels=np.array(CLASSES[name]))


def test_labels_are_scored_by_what_is_hallucinated() -> None:
    shape = RewardShapeConfig(weights={"object": 2.0, "attribute": 1.0, "relation": 0.5})
    items = [labelled(name) for name in CLASSES]
    scores = [one.score for one in score_labels(items, "hallucinations", shape)]
    assert scores == [0.0, -2.5, None]
    rewards = [one.score for one in score_labels(items, "reward", shape)]
    # Every OK is worth 1 and every HALLU -1, by weight: 4 * 3.5, then 2 * 2.5 less.
    repeats = rewards[0] - 14.0  # type: ignore[operator]
    assert rewards[1] == pytest.approx(9.0 + repeats)
    assert rewards[2] is None


def test_claims_are_summed_as_by_rlaif_v() -> None:
    item = labelled("good")
    verdicts: dict[str, Verdict] = {
        fact: replace(verdict, answer="no" if number % 2 else "yes")
        for number, (fact, verdict) in enumerate(item.verdicts.items())
    }
    judged = replace(item, verdicts=verdicts)
    stated = {fact.text for fact in item.facts}
    false = sum(judged.verdicts[fact].answer == "no" for fact in stated)
    assert 0 < false < len(stated)
    shape = RewardShapeConfig()
    assert [one.score for one in score_labels([judged], "claims", shape)] == [-false]
    doubt = {next(iter(stated)): replace(judged.verdicts[next(iter(stated))], answer="unknown")}
    unsure = replace(judged, verdicts=judged.verdicts | doubt)
    assert [one.score for one in score_labels([unsure], "claims", shape)] == [None]
    with pytest.raises(DataError, match="--score hallucinations"):
        list(score_labels([replace(item, facts=())], "claims", shape))


def test_pairs_of_another_base_are_refused(tmp_path: Path) -> None:
    card = PairsCard(policy="other", policy_digest="x", score="labels", counts={})
    write_pairs(tmp_path, make_pairs([text("a", 1), text("b", 0)]), card)
    file = tmp_path / "preference.jsonl"
    check_base(file, "other", "x")
    with pytest.raises(DataError, match=r"pairs of another base.*policy\.model=other.*--any-base"):
        check_base(file, "mine", "y")
    (tmp_path / "pairs.json").write_text("{")
    with pytest.raises(DataError, match=r"pairs\.json"):
        check_base(file, "mine", "y")
    (tmp_path / "pairs.json").unlink()
    check_base(file, "mine", "y")  # a user's own file


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    write_split(tmp_path, "test", 1)
    return next((tmp_path / "images").iterdir())


def rows(path: Path, *given: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What?", "response": "A dog."},
        {"prompt": [{"role": "user", "content": "What?"}], "completion": "A dog."},
        {"messages": [{"role": "user", "content": "What?"},
                      {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]},
        {"conversations": [{"from": "human", "value": "What?"},
                           {"from": "gpt", "value": "A dog."}]},
    ],
)  # fmt: skip
def test_sft_reads_the_forms_that_people_have(
    tmp_path: Path, picture: Path, row: dict[str, object]
) -> None:
    (example,) = read_sft(rows(tmp_path / "a.jsonl", {"image": str(picture), **row})).rows
    assert (example.turns, example.chosen) == ((("user", "What?"),), "A dog.")
    relative = {"images": [f"images/{picture.name}"], **row}
    (tmp_path / "a.json").write_text(json.dumps([relative]))
    assert read_sft(tmp_path / "a.json").rows[0].image == example.image


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": []}, "one image"),
        ({"images": ["a.png", "b.png"]}, "one image"),
        ({"images": ["../../secret.png"]}, "secret.png"),
        ({"chosen": "same", "rejected": "same"}, "the same text"),
        ({"rejected": ""}, "rejected"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "the user's"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"chosen": [{"role": "assistant", "content": "\ud800"}]}, "half a character"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(
    tmp_path: Path, picture: Path, change: dict[str, object], told: str
) -> None:
    good = {"images": [str(picture)], "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."}
    file = rows(tmp_path / "a.jsonl", good, {**good, **change})
    found = read_preferences(file)
    assert len(found.rows) == 1
    assert "a.jsonl:2" in found.warning()
    assert told in found.warning()


@pytest.fixture
def run_dir(tmp_path: Path, picture: Path) -> Path:
    """A run with three labelled responses to one prompt."""
    image = image_ref(picture)
    items = []
    for number, name in enumerate(CLASSES):
        item = labelled(name)
        prompt = replace(item.response.prompt, image=image)
        response = replace(item.response, prompt=prompt, sample=number)
        verdicts = {
            fact: replace(one, query=replace(one.query, image=image), answer="no")
            for fact, one in item.verdicts.items()
        }
        items.append(replace(item, response=response, verdicts=verdicts))
    folder = tmp_path / "scenes_run"
    label_store(folder / "feedback" / "labels.jsonl").append(items)
    return folder


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def settings(run_dir: Path) -> list[str]:
    return [f"dir={run_dir.parent}", f"name={run_dir.name}"]


def test_pairs_of_a_run(run_dir: Path) -> None:
    told = call("pairs", *settings(run_dir))
    assert "1 pairs of 1 prompts; left out: 1 responses without a score" in told
    (row,) = [json.loads(line) for line in (run_dir / "pairs" / "preference.jsonl").open()]
    assert row["chosen"][0]["content"].endswith("g")
    assert row["rejected"][0]["content"].endswith("b")
    assert (row["score_chosen"], row["score_rejected"]) == (0.0, -2.0)
    card = json.loads((run_dir / "pairs" / "pairs.json").read_text())
    assert card["policy_digest"] == checkpoint_digest(resolve_checkpoint("scenes:policy"))
    assert card["counts"]["pairs"] == 1


def test_a_plan_is_told_and_nothing_is_written(run_dir: Path) -> None:
    call("pairs", *settings(run_dir))
    told = call("baseline", "dpo", *settings(run_dir), "--dry-run")
    assert "dpo: 1 rows of" in told
    assert "1 steps of 32 at 0.0005" in told
    assert not (run_dir / "baselines").exists()


def test_no_pairs_is_one_clear_line(run_dir: Path) -> None:
    with pytest.raises(DataError, match="fgaif pairs"):
        call("baseline", "dpo", *settings(run_dir), "--dry-run")
    with pytest.raises(DataError, match=r"no pairs: .*1 with equal scores.*samples_per_prompt=4"):
        call("pairs", *settings(run_dir), "--score", "claims")
    with pytest.raises(ConfigError, match="--rewards goes with --responses"):
        call("pairs", *settings(run_dir), "--rewards", str(run_dir))


def test_options_that_do_not_go_together_are_refused(run_dir: Path) -> None:
    for options in (["sft", "--rewards", "x"], ["dpo-iterative", "--any-base"]):
        with pytest.raises(ConfigError):
            call("baseline", *options, *settings(run_dir))
