"""Intervals before and after: paired over images, held against scipy, and what is said of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap
from test_eval import FakePolicy, run_evaluation

from fgaif.config import Config
from fgaif.eval.before_after import POPE, compare
from fgaif.eval.run_folder import read_run
from fgaif.eval.run_results import read_eval, write_eval
from fgaif.eval.spread import caption_spreads, pope_spreads
from fgaif.types import Json


def rows(counts: np.ndarray, name: str = "any") -> list[Json]:
    """One caption per image; counts (N, 2) of one figure."""
    return [
        {"id": f"p{i}", "sha256": f"image{i}", "counts": {name: row.tolist()}}
        for i, row in enumerate(counts)
    ]


def draw(share: float, seed: int, images: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    segments = rng.integers(3, 9, size=images)
    return np.stack([rng.binomial(segments, share), segments], axis=1).astype(float)


def test_intervals_are_those_of_scipys_paired_bootstrap() -> None:
    """Both are percentile intervals of random resamples: equal but for the draws."""
    before, after = draw(0.4, 1), draw(0.25, 2)
    found = caption_spreads(rows(before), rows(after))["any"]

    def change(a, b, c, d, axis):  # type: ignore[no-untyped-def]
        return c.sum(axis) / d.sum(axis) - a.sum(axis) / b.sum(axis)

    theirs = bootstrap(
        (*before.T, *after.T), change, paired=True, method="percentile", n_resamples=4000,
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert found.change.value == pytest.approx(change(*before.T, *after.T, axis=0))
    assert (found.change.low, found.change.high) == pytest.approx(tuple(theirs), abs=0.01)
    assert found.before.low < 0.4 < found.before.high  # type: ignore[operator]


def test_the_change_is_paired() -> None:
    """Every image gets better by the same: sure, though images differ more than that."""
    before = np.array([[10.0 + 8 * (i % 10), 100.0] for i in range(40)])
    after = before - [3, 0]
    found = caption_spreads(rows(before), rows(after))["any"]
    assert found.change.low == pytest.approx(found.change.high) == pytest.approx(-0.03)
    assert found.before.low < found.after.high  # type: ignore[operator]


def test_captions_of_one_image_are_drawn_together() -> None:
    apart = rows(draw(0.4, 1))
    together = [row | {"sha256": f"image{i // 10}"} for i, row in enumerate(apart)]
    for row in together:
        row["counts"] = {"any": [float(row["sha256"] in ("image0", "image1")), 1.0]}
    found = caption_spreads(together, together)["any"].before
    assert (found.value, found.low, found.high) == (pytest.approx(1 / 3), 0, pytest.approx(2 / 3))


@pytest.mark.parametrize(("flipped", "said"), [(1, "unclear"), (60, "better")])
def test_pope_is_better_only_where_the_interval_says_so(flipped: int, said: str) -> None:
    """A tenth of a point of 300 questions was called better."""
    before = [
        {
            "strategy": "random", "sha256": f"image{i // 3}", "question": f"q{i % 3}",
            "label": True, "yes": i % 4 != 0,
        }
        for i in range(300)
    ]  # fmt: skip
    wrong = [i for i, row in enumerate(before) if not row["yes"]][:flipped]
    after = [row | {"yes": row["yes"] or i in wrong} for i, row in enumerate(before)]
    spreads = pope_spreads(before, after)
    assert list(spreads) == ["mean", "random"]
    change = spreads["random"]["accuracy"].change
    assert change.value == pytest.approx(flipped / 300)
    accuracy = next(figure for figure in POPE if figure.key == "accuracy")
    assert accuracy.verdict(change.low, change.high) == said


def test_what_an_evaluation_writes_gives_the_intervals_of_its_figures(tmp_path: Path) -> None:
    """Sums over the counted captions are the figures; without counts there are no intervals."""
    report, captions, answers = run_evaluation(FakePolicy(), Config())
    for phase in ("before", "after"):
        write_eval(tmp_path / "eval", phase, report, captions, answers)  # type: ignore[arg-type]
    run = read_run(tmp_path)
    for mode, metrics in (("greedy", report.greedy), ("sampled", report.sampled)):
        for row in compare(metrics, metrics, spreads=run.spreads[mode]):  # type: ignore[index]
            value = metrics.kinds.get(row.figure.key, getattr(metrics, row.figure.key, None))
            assert run.spreads[mode][row.figure.key].before.value == value  # type: ignore[index]
            assert row.verdict in ("unclear", "")
    assert report.pope is not None
    assert run.pope_spreads["mean"]["f1"].after.value == pytest.approx(report.pope.f1)
    assert run.to_json(None)["intervals"]["greedy"]["any"]["change"] == [0.0, 0.0]
    for phase in ("before", "after"):
        file = tmp_path / "eval" / f"{phase}_captions.jsonl"
        old = [json.loads(line) for line in file.read_text().splitlines()]
        for row in old:
            del row["counts"]
        file.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert "intervals: an earlier version made this evaluation" in "\n".join(
        read_run(tmp_path).missing
    )


def test_other_judges_do_not_compare(tmp_path: Path) -> None:
    report, captions, answers = run_evaluation(FakePolicy(), Config())
    for phase, judge in (("before", "a"), ("after", "b")):
        tree = tmp_path / "eval" / f"{phase}.json"
        write_eval(tmp_path / "eval", phase, report, captions, answers)  # type: ignore[arg-type]
        tree.write_text(json.dumps(json.loads(tree.read_text()) | {"judge": judge}))
        assert read_eval(tmp_path / "eval", phase).judge == judge  # type: ignore[arg-type]
    run = read_run(tmp_path)
    assert run.spreads == {}
    assert "before and after have other judges" in "\n".join(run.missing)
