"""Light runs sent to a Ray cluster as jobs, and the same runs made alone to compare them with."""

import shutil
import sys
from pathlib import Path

import light_actors
import nodes_job
import pytest
import yaml
from nodes import lasting, steps, write_whole

from cluster.monitoring.ray_jobs import JobRequest, Jobs
from fgaif.config import Config, load_config

ROLES = 6
"""Actors of a run with one rollout engine, one CPU each."""


def settings(folder: Path, *overrides: str) -> Config:
    return load_config(
        None,
        [
            f"dir={folder}", "name=light", "ppo.steps=7", "ppo.rollout_batch=12",
            "ppo.minibatch=6", "ppo.checkpoint_every=2", "policy.max_new_tokens=24",
            "cluster.rollout.chunk=2", "cluster.heartbeat_s=0.5", *overrides,
        ],
    )  # fmt: skip


def python_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the jobs of clusters started from now on find this Python."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")


def submit(jobs: Jobs, config: Config, folder: Path) -> str:
    """Send the light run as a job: only its own modules and its configuration go along."""
    folder.mkdir()
    for module in ("light_actors.py", "nodes_job.py"):
        shutil.copy(Path(__file__).parent / module, folder)
    (folder / "fgaif.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return jobs.submit(
        JobRequest(
            entrypoint="python nodes_job.py fgaif.yaml",
            runtime_env={"working_dir": str(folder)},
            metadata={"fgaif": "train", "run": config.name, "dir": str(config.run_dir)},
            left_out={},
        )
    )


def assert_as_in_peace(config: Config, folder: Path) -> None:
    """The finished run has the metrics and policy of one that nothing disturbed, made here."""
    same = ("steps", "async_depth", "estimator", "samples_per_prompt")
    overrides = [f"ppo.{key}={getattr(config.ppo, key)}" for key in same]
    alone = settings(folder, *overrides)
    alone.run_dir.mkdir(parents=True)
    write_whole(alone.run_dir / "pace", "0")
    nodes_job.train(alone, light_actors.Here(alone).roles())
    ours, theirs = steps(config.run_dir), steps(alone.run_dir)
    assert [lasting(row["metrics"]) for row in ours] == [lasting(row["metrics"]) for row in theirs]
    trained = [f"trained/{number}.json" for number in range(1, config.ppo.steps + 1)]
    for path in ("policy/adapter/policy.json", *trained):
        assert (config.run_dir / path).read_text() == (alone.run_dir / path).read_text(), path
