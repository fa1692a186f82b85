"""The PPO loop over fakes: order of events, versions, checkpoints, exact resume."""

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from fakes import World, prompts, two_segments

from cluster.driver import PpoData, PpoDriver
from cluster.pipeline.keys import stage_values
from cluster.pipeline.stage_status import check_resumable
from fgaif.checkpoint import latest_checkpoint
from fgaif.config import Config, load_config, with_overrides
from fgaif.errors import ActorError, CheckpointError, ConfigError, SyncError
from fgaif.interrupts import interrupt_on_sigterm


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
    data = PpoData(
        prompts=prompts(10),
        anchors=prompts(anchors),
        digest=digest,
        settings=stage_values(settings, "train"),
        check_resumable=partial(check_resumable, settings),
    )
    return PpoDriver(settings, world.roles(), data, two_segments, lambda *_: ())


def test_a_step_samples_with_the_version_that_was_synced_last(tmp_path: Path) -> None:
    world = World()
    steps = driver(world, config(tmp_path)).run()
    next(steps)
    # The first sync proves that the engine starts from the learner's weights.
    assert world.events[:6] == [
        "generate v0", "publish v0", "learner logprobs", "evaluate", "load v0", "probe",
    ]  # fmt: skip
    step = world.events[6:]
    assert step[0] == "generate v0"
    assert sorted(step[1:4]) == ["evaluate", "learner logprobs", "score"]
    assert sorted(step[4:6]) == ["update policy", "update values"]
    assert step[6:] == ["publish v1", "learner logprobs", "evaluate", "load v1", "probe"]
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
    assert next(steps).step == 2
    with pytest.raises(SyncError, match=r"version 2.*rollout-0 confirmed version 1"):
        next(steps)


def test_a_step_whose_sync_fails_is_kept(tmp_path: Path) -> None:
    """It is trained: only the engines have to be brought up to it."""
    settings = config(tmp_path / "cut", "ppo.checkpoint_every=100")
    world, whole = World(), World()
    steps = driver(world, settings).run()
    next(steps)
    world.stale = True
    failed = next(steps)
    with pytest.raises(SyncError, match=r"Step 2 is kept in .*: go on with ppo\.resume=latest"):
        next(steps)
    resumed = World()
    rest = list(driver(resumed, with_overrides(settings, ["ppo.resume=latest"])).run())
    reports = list(driver(whole, config(tmp_path / "whole")).run())
    assert [report.step for report in rest] == [3, 4, 5, 6]
    assert resumed.parameter == whole.parameter
    assert failed.metrics["reward/task"] == reports[1].metrics["reward/task"]


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


@pytest.mark.parametrize(
    ("overrides", "digest", "message"),
    [
        (["ppo.lr=1e-3"], "d", r"other settings: ppo\.lr was 3e-05, is 0\.001"),
        (["data.train=new.jsonl"], "d", r"data\.train was .*, is new\.jsonl"),
        (["ppo.steps=5"], "d", r"ppo\.steps = 5, but .* has gone 6 steps"),
        ([], "other", "was made with data d but this run has other"),
    ],
)
def test_resume_refuses_another_result_or_data_set(
    tmp_path: Path, overrides: list[str], digest: str, message: str
) -> None:
    list(driver(World(), config(tmp_path)).run())
    settings = config(tmp_path, "ppo.resume=latest", *overrides)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        next(driver(World(), settings, digest=digest).run())
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("override", ["ppo.micro_batch=1", "policy.attention=eager"])
def test_resume_goes_on_when_only_the_execution_differs(tmp_path: Path, override: str) -> None:
    list(driver(World(), config(tmp_path)).run())
    settings = config(tmp_path, "ppo.resume=latest", "ppo.steps=8", override)
    assert [report.step for report in driver(World(), settings).run()] == [7, 8]


def test_only_the_newest_checkpoints_are_kept_and_each_holds_an_adapter(tmp_path: Path) -> None:
    settings = config(tmp_path)
    list(driver(World(), settings).run())
    root = settings.run_dir / "policy" / "checkpoints"
    assert sorted(path.name for path in root.glob("step_*")) == ["step_000004", "step_000006"]
    assert (root / "step_000006" / "adapter" / "adapter_config.json").is_file()
    state = json.loads((root / "step_000006" / "state.json").read_text())
    assert state["step"] == 6


def versions_sampled_with(world: World) -> list[int]:
    return [int(event.split("v")[1]) for event in world.events if event.startswith("generate")][1:]


@pytest.mark.parametrize(
    ("depth", "versions"),
    [(0, [0, 1, 2, 3, 4, 5]), (1, [0, 0, 1, 2, 3, 4]), (2, [0, 0, 0, 1, 2, 3])],
)
def test_batches_sampled_ahead_have_the_version_of_so_many_steps_before(
    tmp_path: Path, depth: int, versions: list[int]
) -> None:
    world = World()
    reports = list(driver(world, config(tmp_path, f"ppo.async_depth={depth}")).run())
    assert versions_sampled_with(world) == versions
    ages = [report.metrics["staleness/max"] for report in reports]
    assert ages == [step - version for step, version in enumerate(versions)]
    assert ("tis/mean_weight" in reports[0].metrics) == (depth > 0)


def test_the_next_batch_is_asked_for_before_this_one_is_trained_on(tmp_path: Path) -> None:
    world = World()
    next(driver(world, config(tmp_path, "ppo.async_depth=1")).run())
    started = [event for event in world.events[5:] if event.startswith(("generate", "update"))]
    assert started[:3] == ["generate v0", "generate v0", "update policy"]


@pytest.mark.parametrize("depth", [1, 2])
def test_an_asynchronous_run_that_is_resumed_equals_the_whole_one(
    tmp_path: Path, depth: int
) -> None:
    overrides = [f"ppo.async_depth={depth}"]
    whole = World()
    reports = list(driver(whole, config(tmp_path / "whole", *overrides)).run())
    cut = World()
    steps = driver(cut, config(tmp_path / "cut", *overrides)).run()
    for _ in range(3):
        next(steps)
    resumed = World()
    settings = config(tmp_path / "cut", *overrides, "ppo.resume=latest")
    rest = list(driver(resumed, settings).run())
    assert [report.step for report in rest] == [3, 4, 5, 6]
    assert versions_sampled_with(resumed) == versions_sampled_with(whole)[2 + depth :]
    assert resumed.parameter == whole.parameter
    for ours, theirs in zip(rest, reports[2:], strict=True):
        timeless = {k for k in ours.metrics if "second" not in k}
        assert {k: ours.metrics[k] for k in timeless} == {k: theirs.metrics[k] for k in timeless}


def test_samples_set_aside_are_counted_and_trained_without(tmp_path: Path) -> None:
    world = World()
    world.poison = {"p3"}
    reports = list(driver(world, config(tmp_path, "ppo.rollout_batch=10")).run())
    assert [report.metrics["rollout/set_aside"] for report in reports] == [1] * 6
    assert world.batch_sizes == [9] * 6


def test_a_step_without_any_usable_response_stops_the_run(tmp_path: Path) -> None:
    world = World()
    steps = driver(world, config(tmp_path)).run()
    next(steps)
    world.poison = {prompt.id for prompt in prompts(10)}
    with pytest.raises(ActorError, match="step 2: none of 4 responses can be used"):
        next(steps)


def test_a_first_prompt_that_kills_engines_is_no_probe(tmp_path: Path) -> None:
    settings = config(tmp_path, "ppo.rollout_batch=10")
    first = driver(World(), settings)._requests(0)[0]
    world = World()
    world.poison = {first.prompt.id}
    assert len(list(driver(world, settings).run())) == 6
    world.poison = {prompt.id for prompt in prompts(10)}
    with pytest.raises(ActorError, match="every prompt of the first batch"):
        next(driver(world, settings).run())


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("during", ["generate", "score", "update"])
def test_a_run_that_must_stop_keeps_its_last_finished_step_where_the_learner_is_whole(
    tmp_path: Path, during: str, depth: int
) -> None:
    world = World()
    ahead = f"ppo.async_depth={depth}"
    settings = config(tmp_path, "ppo.checkpoint_every=100", ahead)
    steps = driver(world, settings).run()
    for _ in range(3):
        next(steps)
    world.broken = during
    with pytest.raises(ActorError, match="died for good") as stopped:
        next(steps)
    kept = latest_checkpoint(settings.run_dir / "policy" / "checkpoints")
    if during == "update":
        assert kept is None
        assert "No step is kept yet in " in str(stopped.value)
        return
    assert kept is not None
    assert kept.name == "step_000003"
    assert "go on with ppo.resume=latest" in str(stopped.value)
    resumed = World()
    list(driver(resumed, with_overrides(settings, ["ppo.resume=latest"])).run())
    whole = World()
    list(driver(whole, config(tmp_path / "whole", ahead)).run())
    assert resumed.parameter == whole.parameter
    if during == "score":  # what had been sampled is not sampled again, with other weights
        assert versions_sampled_with(resumed) == versions_sampled_with(whole)[3 + depth :]


def test_a_run_that_goes_on_from_an_older_checkpoint_says_which_it_kept(tmp_path: Path) -> None:
    settings = config(tmp_path)
    list(driver(World(), settings).run())
    older = settings.run_dir / "policy" / "checkpoints" / "step_000004"
    world = World()
    steps = driver(world, with_overrides(settings, [f"ppo.resume={older}"])).run()
    world.broken = "update"
    with pytest.raises(ActorError, match=f"Step 4 is kept in .*: go on with ppo.resume={older}"):
        next(steps)


@pytest.mark.parametrize(("attempts", "kept"), [(1, 4), (9, 2)])
def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_says_what_is_kept(
    tmp_path: Path, attempts: int, kept: int
) -> None:
    """A second attempt is made; what was there before stays in any case."""
    world, settings = World(), config(tmp_path / "cut")
    steps = driver(world, settings).run()
    for _ in range(3):
        next(steps)
    world.full = attempts
    assert next(steps).step == 4  # trained, so that its figures are not lost
    with pytest.raises(CheckpointError) as stopped:
        next(steps)
    folder = settings.run_dir / "policy" / "checkpoints"
    first, last = str(stopped.value).splitlines()
    assert first.startswith(f"checkpoint {folder / 'step_000004'}: No space left on device; free")
    path = folder / f"step_{kept:06d}"
    assert last == f"Step {kept} is kept in {path}: go on with ppo.resume=latest"
    assert latest_checkpoint(folder) == path
    resumed, whole = World(), World()
    list(driver(resumed, with_overrides(settings, ["ppo.resume=latest"])).run())
    list(driver(whole, config(tmp_path / "whole")).run())
    assert resumed.parameter == whole.parameter


# Ctrl-C and SIGTERM.


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal that interrupts this process, as under the command."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt_on_sigterm()
    yield request.param
    for n, handler in before.items():
        signal.signal(n, handler)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("during", "step"), [("generate", 3), ("score", 3), ("update", 4)])
def test_an_interrupted_run_keeps_its_last_step_and_goes_on_to_the_same_end(
    tmp_path: Path,
    number: int,
    during: str,
    step: int,
    depth: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the fourth step. An update that was begun is ended first: it cannot be cut in two."""
    ahead = f"ppo.async_depth={depth}"
    world, settings = World(), config(tmp_path / "cut", "ppo.checkpoint_every=100", ahead)
    steps = driver(world, settings).run()
    reports = [next(steps) for _ in range(3)]
    world.interrupted = during, number
    with pytest.raises(KeyboardInterrupt):
        reports += steps
    assert [report.step for report in reports] == list(range(1, step + 1)), "none of it is lost"
    kept = settings.run_dir / "policy" / "checkpoints" / f"step_{step:06d}"
    assert f"interrupted: step {step} is kept in {kept}" in caplog.text
    resumed, whole = World(), World()
    list(driver(resumed, with_overrides(settings, ["ppo.resume=latest"])).run())
    list(driver(whole, config(tmp_path / "whole", ahead)).run())
    assert resumed.parameter == whole.parameter


def test_a_second_interruption_does_not_wait(tmp_path: Path, number: int) -> None:
    world, settings = World(), config(tmp_path)
    steps = driver(world, settings).run()
    reports = [next(steps) for _ in range(3)]
    world.interrupted, world.twice = ("update", number), True
    with pytest.raises(KeyboardInterrupt):
        reports += steps
    assert len(reports) == 3
    kept = latest_checkpoint(settings.run_dir / "policy" / "checkpoints")
    assert kept is not None
    assert kept.name == "step_000002", "a half update is not kept"
