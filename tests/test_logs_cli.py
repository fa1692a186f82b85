"""``fgaif logs`` on log files as the actors write them; no Ray."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.main import app
from cluster.monitoring.status import LIVE, STATUS, RunAddress, RunState, RunStatus

LOGS = {
    "driver": [
        "2026-01-02 10:00:03,000 WARNING cluster.groups.actor_group: learner-0 died: out of memory",
        "  lower the batch sizes",
        "learner is replaced (1 of 5)",
    ],
    "learner-0": [
        "2026-01-02 10:00:01,500 INFO cluster.monitoring.heartbeat: learner-0: pid 7",
        "2026-01-02 10:00:04,000 INFO cluster.monitoring.heartbeat: learner-0: pid 8 [bold]",
    ],
    "rollout-0": ["2026-01-02 10:00:02,000 INFO actors.rollout: café"],
    "rollout-1": ["2026-01-02 10:00:01,000 INFO actors.rollout: first"],
    "reward-object-0": ["2026-01-02 10:00:05,000 INFO actors.reward: last"],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    (folder / "logs").mkdir(parents=True)
    for actor, lines in LOGS.items():
        text = "".join(f"{line}\n" for line in lines)
        (folder / "logs" / f"{actor}.log").write_text(text, encoding="utf-8")
    return folder


def say(folder: Path, state: RunState, pid: int | None = None) -> None:
    """Write the files by which a run says that it goes on, or how it ended."""
    status = RunStatus(run="mine", state=state, steps=9, updated_at=datetime.now(UTC))
    live = RunAddress(
        address="10.0.0.1:6379",
        namespace="fgaif",
        store="board",
        job="01",
        host=socket.gethostname(),
        pid=pid or os.getpid(),
        started_at=datetime.now(UTC),
    )
    (folder / LIVE).write_text(live.model_dump_json(), encoding="utf-8")
    (folder / STATUS).write_text(status.model_dump_json(), encoding="utf-8")


def logs(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["logs", *map(str, arguments)], terminal_width=60)


def shown(*arguments: object) -> list[str]:
    result = logs(*arguments)
    assert result.exit_code == 0, result.exception
    return result.stdout.splitlines()


def test_all_logs_are_merged_by_time_and_each_line_names_its_actor(run: Path) -> None:
    lines = shown(run)
    assert [line.split()[0] for line in lines] == [
        "rollout-1", "learner-0", "rollout-0", "driver", "driver", "driver", "learner-0",
        "reward-object-0",
    ]  # fmt: skip
    assert lines[2] == f"rollout-0        {LOGS['rollout-0'][0]}"
    assert [line[17:] for line in lines[3:6]] == LOGS["driver"]  # what has no time stays with it
    assert lines[6].endswith("pid 8 [bold]")


@pytest.mark.parametrize(
    ("of", "actors"),
    [
        ("rollout", ["rollout-1", "rollout-0"]),
        ("rollout-1", ["rollout-1"]),
        ("driver", ["driver"] * 3),
        ("reward", ["reward-object-0"]),
        ("reward-object", ["reward-object-0"]),
    ],
)
def test_a_role_or_an_actor_alone(run: Path, of: str, actors: list[str]) -> None:
    assert [line.split()[0] for line in shown(run, of)] == actors


def test_the_last_lines_are_those_of_the_merge(run: Path) -> None:
    assert shown(run, "-n", 2) == shown(run)[-2:]
    assert shown(run, "-n", 0) == []
    assert len(shown(run, "-n", 99)) == 8


def test_a_line_that_was_cut_off_is_shown_when_the_run_is_not_followed(run: Path) -> None:
    with (run / "logs" / "rollout-1.log").open("ab") as file:
        file.write("2026-01-02 10:00:09,000 INFO x: caf\u00e9".encode()[:-1])
    assert shown(run, "rollout-1")[-1] == "rollout-1  2026-01-02 10:00:09,000 INFO x: caf\ufffd"


def test_a_name_is_looked_up_under_runs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parents[1])
    assert shown("mine", "driver") == shown(run, "driver")


def test_errors_say_what_there_is(run: Path) -> None:
    wrong = logs(run, "judge").exception
    assert str(wrong) == (
        f"{run}: nothing is called judge; there are: driver, learner-0, reward-object-0, "
        "rollout-0, rollout-1"
    )
    assert "nothing is called rollou;" in str(logs(run, "rollou").exception)
    assert "no such run folder" in str(logs(run / "none").exception)
    assert "no logs in it" in str(logs(run.parent).exception)


@pytest.fixture
def follow(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Follow the run; ``happens`` are done one by one while the command sleeps."""

    def follow(*happens: Callable[[], object]) -> list[str]:
        left = list(happens)
        monkeypatch.setattr("cluster.cli.logs.time.sleep", lambda _: left.pop(0)())
        lines = shown(run, "--follow", "-n", 1)
        assert not left
        return lines

    return follow


def append(run: Path, actor: str, text: str) -> None:
    with (run / "logs" / f"{actor}.log").open("a", encoding="utf-8") as file:
        file.write(text)


def test_following_shows_what_comes_until_the_run_has_ended(
    run: Path, follow: Callable[..., list[str]]
) -> None:
    say(run, "running")

    def end() -> None:
        append(
            run, "driver", "2026-01-02 10:00:08,000 INFO cluster.monitoring.run_monitor: the end"
        )
        say(run, "ended")

    lines = follow(
        lambda: append(run, "rollout-0", "2026-01-02 10:00:06,000 INFO x: half"),
        lambda: append(run, "rollout-0", " and half\n"),
        lambda: append(run, "rollout-9", "2026-01-02 10:00:07,000 INFO x: a new engine\n"),
        end,
    )
    assert [line.split(maxsplit=5)[0::5] for line in lines] == [
        ["reward-object-0", "last"],
        ["rollout-0", "half and half"],
        ["rollout-9", "a new engine"],
        ["driver", "the end"],
    ]


def test_following_ends_with_a_driver_that_was_killed_and_with_ctrl_c(
    run: Path, follow: Callable[..., list[str]]
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    say(run, "running", gone.pid)
    assert len(follow()) == 1

    def interrupt() -> None:
        raise KeyboardInterrupt

    say(run, "running")
    assert len(follow(interrupt)) == 1
    say(run, "failed")
    assert len(follow()) == 1
