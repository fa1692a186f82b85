"""The PPO loop over fakes: order of events, versions, checkpoints, exact resume."""

import json
from pathlib import Path

import pytest
from fakes import World, prompts, two_segments

from cluster.driver import PpoData, PpoDriver
from fgaif.config import Config, load_config
from fgaif.errors import ConfigError, SyncError


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(
        None,
        [
            f"dir={tmp_path}",
            "ppo.steps=6",
            "ppo.rollout_batch=4",
            "ppo.minibatch=2",
            "ppo.checkpoint_every=2",
            *overrides,
        ],
    )


def driver(world: World, settings: Config, digest: str = "d", anchors: int = 0) -> PpoDriver:
    data = PpoData(prompts=prompts(10), anchors=prompts(anchors), digest=digest)
    return PpoDriver(settings, world.roles(), data, two_segments, lambda *_: ())


def test_a_step_samples_with_the_version_that_was_synced_last(tmp_path: Path) -> None:
    world = World()
    steps = driver(world, config(tmp_path)).run()
    next(steps)
    # The first sync proves that the engine starts from the learner's weights.
    assert world.events[:5] == [
        "generate v0", "publish v0", "learner logprobs", "load v0", "probe",
    ]  # fmt: skip
    step = world.events[5:]
    assert step[0] == "generate v0"
    assert sorted(step[1:4]) == ["evaluate", "learner logprobs", "score"]
    assert sorted(step[4:6]) == ["update policy", "update values"]
    assert step[6:] == ["publish v1", "learner logprobs", "load v1", "probe"]
    world.events.clear()
    next(steps)
    assert world.events[0] == "generate v1"


def test_reports_carry_step_version_and_the_metrics_of_all_roles(tmp_path: Path) -> None:
    reports = list(driver(World(), config(tmp_path)).run())
    assert [(report.step, report.version) for report in reports] == [(n, n) for n in range(1, 7)]
    expected = {
        "reward/object", "hallu/relation", "kl/response", "kl/coef", "length/tokens",
        "length/segments", "mismatch/mean", "policy/loss", "value/loss", "sync/seconds",
        "seconds/total", "seconds/rollout", "tokens_per_second",
    }  # fmt: skip
    assert expected <= set(reports[0].metrics)
    assert reports[0].metrics["length/tokens"] == 4
    assert reports[0].metrics["length/segments"] == 2
    assert reports[0].metrics["hallu/object"] == 0  # the likeliest class is OK everywhere


def test_every_minibatch_gets_its_anchor_questions(tmp_path: Path) -> None:
    world = World()
    settings = config(tmp_path, "ppo.anchor.weight=1", "ppo.anchor.batch_size=3", "ppo.epochs=2")
    next(driver(world, settings, anchors=5).run())
    assert world.anchor_counts == [2 * 2 * 3]  # epochs x minibatches x questions


def test_an_engine_that_keeps_old_weights_stops_the_run(tmp_path: Path) -> None:
    world = World()
    steps = driver(world, config(tmp_path)).run()
    next(steps)
    world.stale = True
    with pytest.raises(SyncError, match=r"version 2.*rollout-0 confirmed version 1"):
        next(steps)


def test_a_run_cut_off_and_resumed_equals_the_run_that_was_not(tmp_path: Path) -> None:
    whole = World()
    reports = list(driver(whole, config(tmp_path / "whole")).run())

    cut = World()
    steps = driver(cut, config(tmp_path / "cut")).run()
    for _ in range(5):  # checkpoints after steps 2 and 4; step 5 is lost
        next(steps)
    resumed = World()
    rest = list(driver(resumed, config(tmp_path / "cut", "ppo.resume=latest")).run())

    assert [report.step for report in rest] == [5, 6]
    assert resumed.parameter == whole.parameter
    assert resumed.value_updates == whole.value_updates
    assert resumed.seeds[1:] == whole.seeds[5:]  # [0] is the probe of the first sync
    for ours, theirs in zip(rest, reports[4:], strict=True):
        timeless = {k for k in ours.metrics if "second" not in k}
        assert {k: ours.metrics[k] for k in timeless} == {k: theirs.metrics[k] for k in timeless}


@pytest.mark.parametrize("changed", ["config", "data"])
def test_resume_refuses_another_configuration_or_data_set(tmp_path: Path, changed: str) -> None:
    list(driver(World(), config(tmp_path)).run())
    override = "ppo.lr=1e-3" if changed == "config" else "seed=0"
    settings = config(tmp_path, "ppo.resume=latest", override)
    digest = "d" if changed == "config" else "other"
    with pytest.raises(ConfigError, match=f"was made with {changed} .* but this run has"):
        next(driver(World(), settings, digest=digest).run())


def test_only_the_newest_checkpoints_are_kept_and_each_holds_an_adapter(tmp_path: Path) -> None:
    settings = config(tmp_path)
    list(driver(World(), settings).run())
    root = settings.run_dir / "policy" / "checkpoints"
    assert sorted(path.name for path in root.glob("step_*")) == ["step_000004", "step_000006"]
    assert (root / "step_000006" / "adapter" / "adapter_config.json").is_file()
    state = json.loads((root / "step_000006" / "state.json").read_text())
    assert state["step"] == 6
