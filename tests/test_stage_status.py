"""Which stages are up to date, and which checkpoints can be gone on from."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.pipeline.keys import ORDER, Stage, stage_values
from cluster.pipeline.old_digests import old_digest
from cluster.pipeline.stage_status import StageStatus, check_resumable
from fgaif.config import Config, dump_config, load_config
from fgaif.errors import ConfigError, DataError


def finished(run_dir: Path, config: Config, stage: Stage) -> StageStatus:
    stage_status = StageStatus(run_dir)
    with stage_status.record(config, stage):
        pass
    return stage_status


def interrupted(run_dir: Path, config: Config, stage: Stage) -> StageStatus:
    stage_status = StageStatus(run_dir)
    with pytest.raises(KeyboardInterrupt), stage_status.record(config, stage):
        raise KeyboardInterrupt
    return stage_status


def test_a_finished_stage_is_done_and_stale_after_a_change_it_depends_on(tmp_path: Path) -> None:
    stage_status, config = StageStatus(tmp_path), load_config(None)
    assert stage_status.status(config, "sample") == "missing"
    with stage_status.record(config, "sample"):
        assert stage_status.status(config, "sample") == "partial"
    assert stage_status.status(config, "sample") == "done"
    assert stage_status.seconds()["sample"] >= 0
    found = stage_status.found(load_config(None, ["policy.temperature=0.7"]), "sample")
    assert found.status == "stale"
    assert found.why == "policy.temperature was 1.0, is 0.7"


def test_an_interrupted_stage_is_partial(tmp_path: Path) -> None:
    config = load_config(None)
    stage_status = interrupted(tmp_path, config, "train")
    assert stage_status.status(config, "train") == "partial"
    assert "train" not in stage_status.seconds()


def test_execution_keeps_a_stage_and_more_of_it_makes_it_short(tmp_path: Path) -> None:
    stage_status = finished(tmp_path, load_config(None, ["ppo.steps=4"]), "train")
    for overrides, status, why in (
        (["ppo.steps=4", "ppo.micro_batch=1", "policy.attention=eager"], "done", ""),
        (["ppo.steps=6"], "short", "ppo.steps was 4, is 6"),
        (["ppo.steps=3"], "long", "ppo.steps was 4, is 3"),
        (["ppo.steps=6", "ppo.lr=1"], "stale", "ppo.lr was 3e-05, is 1.0"),
    ):
        found = stage_status.found(load_config(None, overrides), "train")
        assert (found.status, found.why) == (status, why)


def test_an_interrupted_stage_that_is_to_go_further_is_partial_still(tmp_path: Path) -> None:
    stage_status = interrupted(tmp_path, load_config(None, ["ppo.steps=4"]), "train")
    assert stage_status.status(load_config(None, ["ppo.steps=6"]), "train") == "partial"
    assert stage_status.status(load_config(None, ["ppo.steps=3"]), "train") == "long"


def test_a_broken_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(DataError, match=r"stages\.json.*delete it"):
        StageStatus(tmp_path).status(load_config(None), "sample")


# Runs of before: digests instead of values.

APIS = [
    "feedback.extractor=api:w", "endpoints.w.model=m", "reward.noise={object: {flip: 0.1}}",
    "ppo.lr=1e-5",
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "digests"),
    [
        (["ppo.lr=1e-7"], "9fd4bbb7fdfc61e5 2804cf0b655740d0 590cfd68242d55c1 b0f67e568137aa46 "
             "cfc89977da8cdca8 c759f381727d9c43"),
        (APIS, "9fd4bbb7fdfc61e5 5e29da4f0cbd06e3 f9c5e92543721331 bce4d575707de854 "
               "64de4dfe6a8d741e 77f728d495664b34"),
    ],
)  # fmt: skip
def test_digests_of_earlier_versions_are_known_still(overrides: list[str], digests: str) -> None:
    """The digests are those that the version before this one wrote. Where a default changed since,
    name the old value in ``overrides``."""
    config = load_config(None, overrides)
    assert [old_digest(config, stage) for stage in ORDER[:-1]] == digests.split()


def old_run(run_dir: Path, config: Config, seconds: float | None = 2.0) -> StageStatus:
    """The stages.json of an earlier version, and the config.yaml beside it."""
    run_dir.mkdir(exist_ok=True)
    entry = {"digest": old_digest(config, "train"), "seconds": seconds}
    (run_dir / "stages.json").write_text(json.dumps({"train": entry}))
    (run_dir / "config.yaml").write_text(dump_config(config))
    return StageStatus(run_dir)


@pytest.mark.parametrize(
    ("overrides", "status"),
    [
        ([], "done"),
        (["ppo.micro_batch=1", "policy.attention=eager"], "done"),
        (["ppo.steps=60"], "short"),
        (["ppo.lr=1"], "stale"),
    ],
)
def test_old_runs_are_judged_by_the_configuration_beside_them(
    tmp_path: Path, overrides: list[str], status: str
) -> None:
    assert old_run(tmp_path, load_config(None)).status(load_config(None, overrides), "train") == (
        status
    )


def test_an_old_run_keeps_its_values_when_the_configuration_beside_it_changes(
    tmp_path: Path,
) -> None:
    stage_status = old_run(tmp_path, load_config(None))
    stage_status.keep_values()
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None, ["ppo.lr=1"])))
    assert stage_status.status(load_config(None, ["ppo.micro_batch=1"]), "train") == "done"


def test_an_old_run_whose_settings_are_not_known_is_judged_by_its_digest(tmp_path: Path) -> None:
    stage_status = old_run(tmp_path, load_config(None))
    (tmp_path / "config.yaml").unlink()
    assert stage_status.status(load_config(None), "train") == "done"
    found = stage_status.found(load_config(None, ["ppo.micro_batch=1"]), "train")
    assert found.status == "stale"
    assert "earlier version" in found.why


# Checkpoints.


def state(config: Config, step: int = 4) -> dict[str, Any]:
    return {"config": stage_values(config, "train"), "step": step}


@pytest.mark.parametrize(
    "overrides", [[], ["ppo.micro_batch=1"], ["policy.attention=eager"], ["ppo.steps=60"]]
)
def test_execution_and_more_steps_go_on_from_a_checkpoint(overrides: list[str]) -> None:
    check_resumable(load_config(None, overrides), state(load_config(None)), Path("step_000004"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.lr=1"], r"step_000004 was made with other settings: ppo\.lr was 3e-05, is 1\.0"),
        (["reward.lr=1"], r"reward\.lr was 2e-05, is 1\.0.*moved aside"),
        (["ppo.steps=3"], r"ppo\.steps = 3, but .*step_000004 has gone 4 steps: set ppo\.steps=4"),
        (
            ["ppo.schedule=cosine", "ppo.steps=60"],
            r"ppo\.steps was 54, is 60; ppo\.schedule was constant, is cosine",
        ),
    ],
)
def test_a_checkpoint_of_another_result_is_refused_by_key_and_values(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_resumable(load_config(None, overrides), state(load_config(None)), Path("step_000004"))


def test_a_checkpoint_of_an_earlier_version_is_known_by_its_digest(tmp_path: Path) -> None:
    config = load_config(None, [f"dir={tmp_path}"])
    old = {"config": old_digest(config, "train"), "step": 4}
    check_resumable(config, old, Path("step_000004"))
    changed = load_config(None, [f"dir={tmp_path}", "ppo.micro_batch=1"])
    with pytest.raises(ConfigError, match="earlier version"):
        check_resumable(changed, old, Path("step_000004"))
    # Where stages.json names it, all that differs now is known not to matter.
    old_run(config.run_dir, config, seconds=None)
    interrupted(config.run_dir, changed, "train")
    check_resumable(changed, old, Path("step_000004"))
