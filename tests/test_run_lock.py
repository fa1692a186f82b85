"""One driver per run folder, and none in a folder that fgaif did not make."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.pipeline import run_lock
from cluster.pipeline.run_lock import LOCK, driver_lock, require_own
from fgaif.errors import ActorError, DataError

HOLD = """
import sys
from pathlib import Path
from cluster.pipeline.run_lock import driver_lock
with driver_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_driver(run: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.communicate()


def enter(run: Path) -> None:
    with driver_lock(run, wait_s=0):
        pass


def name_in(run: Path, host: str, pid: int, since: str = "2100-01-01T00:00:00+00:00") -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / LOCK).write_text(json.dumps({"host": host, "pid": pid, "since": since}))


def test_a_second_driver_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    with (
        other_driver(tmp_path / "run") as first,
        pytest.raises(ActorError, match=rf"process {first.pid} on {socket.gethostname()}, "),
    ):
        enter(tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was begun in it"
    enter(tmp_path / "run")


def test_a_lock_that_was_removed_while_it_was_waited_for_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real, waits = tmp_path / "run", run_lock._lock, []

    def slow(descriptor: int, path: Path, wait_s: float) -> bool:
        waits.append(path)
        if len(waits) == 1:  # the one before ends, and its folder is empty
            path.unlink()
            run.rmdir()
        return real(descriptor, path, wait_s)

    monkeypatch.setattr(run_lock, "_lock", slow)
    with driver_lock(run):
        assert (run / LOCK).is_file()
    assert len(waits) == 2


def test_one_that_was_killed_is_named_and_stands_in_nobody_s_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with other_driver(tmp_path / "run") as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with caplog.at_level(logging.WARNING):
        enter(tmp_path / "run")
    assert f"ended without a word (process {first.pid} on " in caplog.text
    caplog.clear()
    enter(tmp_path / "run")
    assert caplog.text == ""


def test_an_error_inside_ends_the_lock_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt), driver_lock(tmp_path / "run"):
        raise KeyboardInterrupt
    enter(tmp_path / "run")
    assert caplog.text == ""


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.usefixtures("no_locks")
def test_where_the_file_system_keeps_no_locks_the_name_decides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, here = tmp_path / "run", socket.gethostname()
    enter(run)
    assert "keeps no locks (No locks available)" in caplog.text
    name_in(run, here, psutil.Process().parent().pid)
    with pytest.raises(ActorError, match="another run works in this folder"):
        enter(run)
    name_in(run, "elsewhere", 1)
    with pytest.raises(ActorError, match=rf"process 1 on elsewhere.*then empty {run / LOCK}$"):
        enter(run)
    (run / LOCK).write_text("")  # the advice
    enter(run)
    # Gone: its number is that of a younger process by now.
    name_in(run, here, os.getpid(), since="2000-01-01T00:00:00+00:00")
    enter(run)
    assert "ended without a word" in caplog.text


@pytest.mark.parametrize(
    "content", [[], ["stages.json"], [LOCK, "policy"], ["live.json", "status.json"]]
)
def test_folders_of_runs_old_and_new_and_empty_ones_are_ours(
    tmp_path: Path, content: list[str]
) -> None:
    for name in content:
        (tmp_path / name).write_text("")
    require_own(tmp_path)
    enter(tmp_path)


def test_a_folder_of_somebody_else_s_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "law.txt").write_text("theirs")
    for refused in (require_own, enter):
        with pytest.raises(DataError, match=r"holds policy, but no run of fgaif"):
            refused(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["policy", "law.txt"]


def test_a_file_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(DataError, match="cannot be read as a run folder"):
        enter(tmp_path / "run")
