"""A run whose head node is lost: nothing of it stays behind, and submitting it again goes on."""

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from light_jobs import ROLES, assert_as_in_peace, python_first, settings, submit
from nodes import Nodes, living, runs, steps, wait_for, write_whole
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.monitoring.ray_jobs import Jobs

LOST_AFTER_S = 5
"""Ray's default is 60: nodes wait so long for their head to come back."""


def start() -> Nodes:
    nodes = Nodes(_system_config={"gcs_rpc_server_reconnect_timeout_s": LOST_AFTER_S})
    nodes.add(cpus=ROLES)
    return nodes


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    python_first(monkeypatch)
    nodes = start()
    yield nodes
    nodes.stop()


def fgaif(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None, result.exception
    return result.stdout


@pytest.mark.long
def test_a_run_whose_head_is_lost_goes_on_from_its_checkpoint(first: Nodes, tmp_path: Path) -> None:
    config = settings(tmp_path / "runs", "ppo.steps=5")
    run = config.run_dir
    run.mkdir(parents=True)
    write_whole(run / "until", "3")  # one step more than the last checkpoint has
    jobs = Jobs(first.dashboard)
    job = submit(jobs, config, tmp_path / "job")
    wait_for("step 3", lambda: jobs.status(job).status.is_terminal() or len(steps(run)) == 3)
    driver = json.loads((run / "live.json").read_text())["pid"]
    everything = [psutil.Process(pid) for pid in (driver, *(a["pid"] for a in living(run, "*")))]
    assert len(everything) == 1 + ROLES
    kept = (run / "trained" / "2.json").stat().st_mtime_ns

    first.kill_head()
    wait_for("an end", lambda: not any(map(runs, everything)), LOST_AFTER_S + 90)
    text = " ".join(fgaif("status", run).split())
    assert "light died step 3/5" in text
    assert "no Ray cluster answers" in text
    assert "its command goes on from its last checkpoint" in text

    again = settings(tmp_path / "runs", "ppo.steps=5", "ppo.resume=latest")
    (run / "until").unlink()
    second = start()
    try:
        jobs = Jobs(second.dashboard)
        job = submit(jobs, again, tmp_path / "again")
        said = "".join(jobs.follow(job))
        assert jobs.status(job).status == "SUCCEEDED", said
    finally:
        second.stop()
    assert "removed 1 lines from step 3 on" in said
    assert (run / "trained" / "2.json").stat().st_mtime_ns == kept
    assert_as_in_peace(config, tmp_path / "here")
    assert "light ended step 5/5" in " ".join(fgaif("status", run).split())
