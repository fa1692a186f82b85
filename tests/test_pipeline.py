"""The whole job with the real parts, at small size: vLLM, Ray, Ray Train, DeepSpeed, PEFT."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fgaif.types import KINDS

SMALL = [
    "data.feedback_prompts=96",
    "data.ppo_prompts=32",
    "data.eval_prompts=12",
    "reward.epochs=1",
    "reward.evals=2",
    "ppo.steps=2",
    "ppo.rollout_batch=8",
    "ppo.minibatch=4",
    "ppo.micro_batch=4",
    "ppo.checkpoint_every=1",
    "ppo.anchor.batch_size=4",
]


def command(directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "fgaif", *arguments, f"dir={directory}", *SMALL]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished small run of the demo, and what it printed."""
    directory = tmp_path_factory.mktemp("runs")
    done = subprocess.run(command(directory, "demo"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return directory / "scenes", done.stdout


@pytest.mark.slow
def test_the_demo_leaves_every_stage_and_a_complete_report(finished: tuple[Path, str]) -> None:
    run, printed = finished
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["seed"] == 0
    assert set(report["stages"]) >= {
        "sample", "annotate", "train-reward", "eval-before", "train", "eval-after",
    }  # fmt: skip
    assert set(report["rewards"]) == set(report["feedback"]) == set(KINDS)
    for kind in KINDS:
        assert {"accuracy", "f1_hallu"} <= set(report["rewards"][kind])
    keys = {*KINDS, "any", "chair_s", "chair_i", "recall", "true_facts", "length", "repetition"}
    for phase in ("before", "after"):
        for mode in ("greedy", "sampled"):
            assert keys | {"malformed"} <= set(report[phase][mode])
        assert {"accuracy", "f1", "yes_ratio"} <= set(report[phase]["pope"])
    page = (run / "report" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    assert len(list((run / "report").glob("*.png"))) == 3
    assert str(run / "report" / "report.html") in printed.replace("\n", "")


@pytest.mark.slow
def test_a_second_call_skips_what_is_there(finished: tuple[Path, str]) -> None:
    run, _ = finished
    before = (run / "policy" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    done = subprocess.run(
        command(run.parent, "demo"), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0
    for stage in ("sample", "annotate", "train-reward", "eval-before", "train", "eval-after"):
        assert f"{stage}: up to date" in done.stdout
    after = (run / "policy" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert before == after


@pytest.mark.slow
def test_metrics_hold_one_line_per_step_with_the_mismatch(finished: tuple[Path, str]) -> None:
    run, _ = finished
    lines = (run / "policy" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["metrics"]["mismatch/mean"] < 0.005
        assert row["metrics"]["sync/max_abs_diff"] < 1e-3


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_parameters(finished: tuple[Path, str]) -> None:
    """The run of the fixture went through; the same training is killed -9 and resumed here."""
    run, _ = finished
    adapter = run / "policy" / "adapter" / "adapter_model.safetensors"
    expected = load_file(adapter)
    checkpoints = run / "policy" / "checkpoints"
    training = subprocess.Popen(command(run.parent, "train", "--force"))
    try:
        _wait_for(lambda: not adapter.exists(), training)  # the old output is cleared first
        _wait_for((checkpoints / "step_000001" / "manifest.json").exists, training)
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    assert not adapter.exists()
    resumed = subprocess.run(
        command(run.parent, "train", "--resume", "latest"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    found = load_file(adapter)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] == value).all(), name


@pytest.mark.slow
def test_ctrl_c_says_what_is_kept_and_exits_with_130(tmp_path: Path) -> None:
    sampling = subprocess.Popen(
        command(tmp_path, "sample"),
        stderr=subprocess.PIPE,
        text=True,
        # A job in a shell's background has interrupts turned off, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _wait_for((tmp_path / "scenes" / "stages.json").exists, sampling)
    sampling.send_signal(signal.SIGINT)
    _, message = sampling.communicate(timeout=120)
    assert sampling.returncode == 130
    assert "interrupted: what was finished is kept" in message.replace("\n", " ")


def _wait_for(condition: object, process: subprocess.Popen[Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
