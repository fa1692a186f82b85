"""Which stages are up to date."""

from pathlib import Path

import pytest

from cluster.ledger import Ledger, stage_digest
from fgaif.config import load_config
from fgaif.errors import DataError


def test_a_finished_stage_is_done_and_stale_after_a_change_it_depends_on(tmp_path: Path) -> None:
    ledger, config = Ledger(tmp_path), load_config(None)
    assert ledger.status(config, "sample") == "missing"
    with ledger.record(config, "sample"):
        assert ledger.status(config, "sample") == "partial"
    assert ledger.status(config, "sample") == "done"
    assert ledger.seconds()["sample"] >= 0
    hotter = load_config(None, ["policy.temperature=0.7"])
    assert ledger.status(hotter, "sample") == "stale"


def test_an_interrupted_stage_is_partial(tmp_path: Path) -> None:
    ledger, config = Ledger(tmp_path), load_config(None)
    with pytest.raises(KeyboardInterrupt), ledger.record(config, "train"):
        raise KeyboardInterrupt
    assert ledger.status(config, "train") == "partial"
    assert "train" not in ledger.seconds()


@pytest.mark.parametrize(
    ("override", "changed", "same"),
    [
        ("policy.temperature=0.7", ["sample", "annotate", "train-reward", "train"], []),
        ("segment.min_words=3", ["annotate", "train-reward", "eval-before", "train"], ["sample"]),
        ("reward.lr=1", ["train-reward", "train", "eval-after"], ["sample", "annotate"]),
        ("ppo.lr=1", ["train", "eval-after"], ["sample", "train-reward", "eval-before"]),
        ("data.responses=given.jsonl", ["sample", "annotate", "train"], []),
        ("endpoints.judge.model=j", [], ["annotate", "train"]),
        ("ppo.resume=latest", [], ["sample", "train", "eval-after"]),
        ("ppo.checkpoint_every=1", [], ["train"]),
        ("cluster.rollout.replicas=2", [], ["sample", "train"]),
        ("dir=elsewhere", [], ["sample", "train"]),
    ],
)
def test_digests_follow_the_dependencies(
    override: str, changed: list[str], same: list[str]
) -> None:
    before, after = load_config(None), load_config(None, [override])
    for stage in changed:
        assert stage_digest(before, stage) != stage_digest(after, stage), stage  # type: ignore[arg-type]
    for stage in same:
        assert stage_digest(before, stage) == stage_digest(after, stage), stage  # type: ignore[arg-type]


def test_a_broken_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(DataError, match=r"stages\.json.*delete it"):
        Ledger(tmp_path).status(load_config(None), "sample")


def test_labels_depend_on_the_models_that_make_them() -> None:
    asked = ["feedback.extractor=api:writer", "endpoints.writer.model=one"]
    before = load_config(None, asked)
    for override, same in (("model=two", False), ("concurrency=3", True), ("price_input=3", True)):
        after = load_config(None, [*asked, f"endpoints.writer.{override}"])
        assert (stage_digest(before, "annotate") == stage_digest(after, "annotate")) is same
