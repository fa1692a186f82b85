"""The whole job with the real parts, at small size: vLLM, Ray, Ray Train, DeepSpeed, PEFT.

As on GPUs: in bfloat16, adapters served unmerged, reward models on one backbone.
``make test-all`` repeats it as the demo on the CPU is.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from light_jobs import python_first
from nodes import Nodes, lasting, steps, wait_for
from safetensors.torch import load_file
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.monitoring.ray_jobs import Jobs
from cluster.monitoring.status import read_status
from fgaif.types import DEFAULT_KINDS

STEPS = 4
BATCH = 8
SMALL = [
    "data.feedback_prompts=96",
    "data.ppo_prompts=32",
    "data.eval_prompts=12",
    "reward.epochs=1",
    "reward.evals=2",
    f"ppo.steps={STEPS}",
    f"ppo.rollout_batch={BATCH}",
    "ppo.minibatch=4",
    "ppo.micro_batch=4",
    "ppo.checkpoint_every=1",
    "ppo.anchor.batch_size=4",
    "cluster.rollout.chunk=2",
    "tracking.rollouts=1",
]


DTYPES = {
    "bfloat16": ["policy.dtype=bfloat16", "cluster.reward.shared=true"],
    "float32": ["policy.dtype=float32"],
}


class Finished(NamedTuple):
    """A finished small run of the demo, and what it printed."""

    run: Path
    printed: str
    dtype: str


def command(directory: Path, dtype: str, *arguments: str) -> list[str]:
    settings = [f"dir={directory}", *SMALL, *DTYPES[dtype]]
    return [sys.executable, "-m", "fgaif", *arguments, *settings]


@pytest.fixture(
    scope="module", params=["bfloat16", pytest.param("float32", marks=pytest.mark.long)]
)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    directory, dtype = tmp_path_factory.mktemp("runs"), request.param
    demo = command(directory, dtype, "demo")
    done = subprocess.run(demo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Finished(directory / "scenes", done.stdout, dtype)


in_bfloat16 = pytest.mark.parametrize("finished", ["bfloat16"], indirect=True)
in_float32 = pytest.mark.parametrize("finished", ["float32"], indirect=True)


@pytest.mark.slow
def test_the_demo_leaves_every_stage_and_a_complete_report(finished: Finished) -> None:
    run, printed, _ = finished
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["seed"] == 0
    assert set(report["stages"]) >= {
        "sample", "annotate", "train-reward", "eval-before", "train", "eval-after",
    }  # fmt: skip
    assert set(report["rewards"]) == set(report["feedback"]) == set(DEFAULT_KINDS)
    for kind in DEFAULT_KINDS:
        assert {"accuracy", "f1_hallu"} <= set(report["rewards"][kind])
    keys = {
        *DEFAULT_KINDS,
        "any",
        "chair_s",
        "chair_i",
        "recall",
        "true_facts",
        "length",
        "repetition",
    }
    for phase in ("before", "after"):
        for mode in ("greedy", "sampled"):
            assert keys | {"malformed"} <= set(report[phase][mode])
        assert {"accuracy", "f1", "yes_ratio"} <= set(report[phase]["pope"])
    page = (run / "report" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    assert len(list((run / "report").glob("*.png"))) == 3
    assert str(run / "report" / "report.html") in printed.replace("\n", "")


@pytest.mark.slow
def test_a_second_call_skips_what_is_there(finished: Finished) -> None:
    run, _, dtype = finished
    before = (run / "policy" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    done = subprocess.run(
        command(run.parent, dtype, "demo"), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0
    for stage in ("sample", "annotate", "train-reward", "eval-before", "train", "eval-after"):
        assert f"{stage}: up to date" in done.stdout
    after = (run / "policy" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert before == after


@pytest.mark.slow
def test_metrics_hold_one_line_per_step_with_the_mismatch(finished: Finished) -> None:
    run, _, dtype = finished
    lines = (run / "policy" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["metrics"]["mismatch/mean"] < 0.005
        assert row["metrics"]["sync/arrived"] >= 0.99
        if dtype == "float32":
            assert row["metrics"]["sync/max_abs_diff"] < 1e-3


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    python_first(monkeypatch)
    cluster = Nodes()
    yield cluster
    cluster.stop()


def fgaif(*arguments: object) -> str:
    """Run a command in this process and return what it printed."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.exception
    return result.stdout


def engines(run: Path) -> dict[int, str]:
    """States of the rollout engines by process, of those that have one."""
    status = read_status(run)
    assert status is not None
    found = [actor for actor in status.actors if actor.role == "rollout"]
    return {actor.pid: actor.state for actor in found if actor.pid is not None}


def at_work(run: Path) -> list[int]:
    return [pid for pid, state in engines(run).items() if state == "busy"]


def rollouts(run: Path, step: int) -> list[Any]:
    """What a step was trained on; images lie in the run's own folder."""
    path = run / "policy" / "rollouts" / f"step_{step:06d}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[1:]:
        del row["image"]["path"]
    return rows


@pytest.mark.long
@in_float32
def test_the_training_on_many_nodes_ends_the_same_after_scaling_and_the_loss_of_one(
    finished: Finished, nodes: Nodes, tmp_path: Path
) -> None:
    """Submitted as a job; two more engines come in mid-step, one goes with its node in another."""
    alone, run = finished.run, tmp_path / "scenes"
    shutil.copytree(alone, run, ignore=shutil.ignore_patterns("policy", "status.json", "live.json"))
    stages = json.loads((run / "stages.json").read_text())
    del stages["train"]
    (run / "stages.json").write_text(json.dumps(stages))
    nodes.add(cpus=2)  # one for an engine, the others share the other
    job = fgaif(
        *("submit", "train", "--no-follow", "--address", nodes.dashboard, f"dir={tmp_path}"),
        *(*SMALL, "policy.dtype=float32", "cluster.rollout.cpus=1", "cluster.heartbeat_s=1"),
        "cluster.heartbeat_timeout_s=600",  # engines are stopped for a while
    ).split()[-1]
    jobs = Jobs(nodes.dashboard)

    def reached(step: int) -> bool:
        assert not jobs.status(job).status.is_terminal(), jobs.logs(job)
        return len(steps(run)) >= step

    wait_for("step 1", lambda: reached(1))
    (first,) = engines(run)
    os.kill(first, signal.SIGSTOP)  # step 2 waits for it, and the others do the rest of it
    calm, doomed = nodes.add(cpus=1), nodes.add(cpus=1)
    assert "3 rollout engines are ready" in fgaif("scale", run, "--rollout", 3, "--wait")
    (victim,) = nodes.workers(doomed) & engines(run).keys()
    assert nodes.workers(calm) & engines(run).keys()
    os.kill(first, signal.SIGCONT)

    wait_for("step 2", lambda: reached(2))
    os.kill(victim, signal.SIGSTOP)
    wait_for("it alone to be at work", lambda: at_work(run) == [victim])
    nodes.kill(doomed)
    fgaif("scale", run, "--rollout", 1)
    said = "".join(jobs.follow(job))
    assert jobs.status(job).status == "SUCCEEDED", said

    assert len(engines(run)) == 1
    assert re.search(r"rollout-[12] died", (run / "logs" / "driver.log").read_text())
    found, expected = (
        [lasting(row["metrics"]) for row in steps(folder)] for folder in (run, alone)
    )
    assert found == expected
    for step in range(1, STEPS + 1):
        assert rollouts(run, step) == rollouts(alone, step)
        asked = {(row["prompt"]["id"], row["sample"]) for row in rollouts(run, step)[1:]}
        assert len(asked) == BATCH
    assert_bitwise(adapter_of(run), adapter_of(alone))


def adapter_of(run: Path) -> dict[str, Any]:
    return load_file(run / "policy" / "adapter" / "adapter_model.safetensors")


def assert_bitwise(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] == value).all(), name


@pytest.mark.long
@in_bfloat16
def test_a_bfloat16_run_killed_in_ppo_and_run_again_equals_the_straight_one(
    finished: Finished, tmp_path: Path
) -> None:
    """Policy, reward models, reference and engines in bfloat16, adapters served unmerged."""
    killed = command(tmp_path, finished.dtype, "demo")
    alone, run = finished.run, tmp_path / "scenes"
    ignored = shutil.ignore_patterns("policy", "after*", "status.json", "live.json")
    shutil.copytree(alone, run, ignore=ignored)
    stages = json.loads((run / "stages.json").read_text())
    del stages["train"], stages["eval-after"]
    (run / "stages.json").write_text(json.dumps(stages))

    training = subprocess.Popen(killed)
    kept = run / "policy" / "checkpoints" / "step_000002" / "manifest.json"
    try:
        _wait_for(kept.exists, training)
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    assert not (run / "policy" / "adapter").exists()
    again = subprocess.run(killed, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "train: going on" in again.stdout

    assert_bitwise(adapter_of(run), adapter_of(alone))
    found, expected = (
        [lasting(row["metrics"]) for row in steps(folder)] for folder in (run, alone)
    )
    assert found == expected
    assert len(found) == STEPS
    for step in range(1, STEPS + 1):
        assert rollouts(run, step) == rollouts(alone, step)
    after = (folder / "eval" / "after.json" for folder in (run, alone))
    assert len({path.read_text() for path in after}) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "finished", [pytest.param("bfloat16", marks=pytest.mark.ci), "float32"], indirect=True
)
def test_killed_and_resumed_gives_the_same_parameters(finished: Finished) -> None:
    """The run of the fixture went through; the same training is killed -9 and resumed here."""
    run, _, dtype = finished
    adapter = run / "policy" / "adapter" / "adapter_model.safetensors"
    expected = adapter_of(run)
    checkpoints = run / "policy" / "checkpoints"
    training = subprocess.Popen(command(run.parent, dtype, "train", "--force"))
    try:
        _wait_for(lambda: not adapter.exists(), training)  # the old output is cleared first
        _wait_for((checkpoints / "step_000001" / "manifest.json").exists, training)
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    assert not adapter.exists()
    resumed = subprocess.run(
        command(run.parent, dtype, "train", "--resume", "latest"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert_bitwise(adapter_of(run), expected)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_what_is_kept_and_exit_with_130(number: int, tmp_path: Path) -> None:
    sampling = subprocess.Popen(
        command(tmp_path, "float32", "sample"),
        stderr=subprocess.PIPE,
        text=True,
        # A job in a shell's background has interrupts turned off, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _wait_for((tmp_path / "scenes" / "stages.json").exists, sampling)
    sampling.send_signal(number)
    _, message = sampling.communicate(timeout=120)
    assert sampling.returncode == 130
    assert "interrupted: what was finished is kept" in message.replace("\n", " ")
    assert "*** SIG" not in message, "no dump of Ray's native part"
    status = read_status(tmp_path / "scenes")
    assert status is not None
    assert status.state == "interrupted"


def _wait_for(condition: object, process: subprocess.Popen[Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
@in_bfloat16
def test_an_estimator_without_a_critic_trains_with_the_real_actors(
    finished: Finished, tmp_path: Path
) -> None:
    """Groups, the KL in the loss, and the verifier's verdicts as rewards; nobody loads a critic."""
    run = tmp_path / "runs" / "scenes"
    shutil.copytree(finished.run, run)
    train = [
        *command(tmp_path / "runs", finished.dtype, "train"), "ppo.estimator=token_grpo",
        "ppo.samples_per_prompt=4", "ppo.kl.placement=loss", "ppo.reward_source=verifier",
    ]  # fmt: skip
    done = subprocess.run(train, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [row["metrics"] for row in steps(run)]
    assert len(rows) == STEPS
    for row in rows:
        assert not any(name.startswith("value/") for name in row)
        assert row["policy/kl_loss"] >= 0
        assert row["sync/arrived"] >= 0.99
    assert sum(row["verifier/questions"] for row in rows) > 0
    newest = run / "policy" / "checkpoints" / f"step_{STEPS:06d}"
    assert not (newest / "reference").exists()
    dump = run / "policy" / "rollouts" / "step_000001.jsonl"
    head, *responses = map(json.loads, dump.read_text().splitlines())
    assert head["estimator"] == "token_grpo"
    ids = [(row["prompt"]["id"], row["sample"]) for row in responses]
    assert len(set(ids)) == BATCH
    assert len({prompt for prompt, _ in ids}) == BATCH // 4
    again = subprocess.run(train, capture_output=True, text=True, check=False, timeout=120)
    assert "train: up to date" in again.stdout
