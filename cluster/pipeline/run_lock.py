"""Whose a run folder is: made by fgaif, and worked in by one driver at a time.

``RUN/driver.lock`` says by its presence that the folder is fgaif's. It is locked (fcntl) by the
driver at work and names it; the file system keeps the lock, also between machines that share it,
and drops it when the process ends, however that ends. Where it keeps no locks, the name decides.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cluster.monitoring.status import process_lives
from fgaif.errors import ActorError, DataError

log = logging.getLogger(__name__)

LOCK = "driver.lock"
_MARKS = ({LOCK}, {"stages.json"}, {"live.json", "status.json"})
"""Files of which one set is enough: runs of earlier versions have no lock."""
_WAIT_S = 10.0  # that of a driver which is just ending
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A driver, as the lock file names it."""

    host: str
    pid: int
    since: str
    """Time in whole seconds, ISO 8601."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def require_own(run_dir: Path) -> None:
    """Refuse a folder that holds something but no run of fgaif: nothing there is ours to move.

    Raises:
        DataError: names what is there.
    """
    try:
        names = sorted(path.name for path in run_dir.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(
            f"{run_dir}: cannot be read as a run folder: {error.strerror}; choose another name "
            "or dir"
        ) from error
    if names and not any(mark.issubset(names) for mark in _MARKS):
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise DataError(
            f"{run_dir} holds {shown}, but no run of fgaif ({LOCK} or stages.json): nothing "
            "there will be moved or overwritten; choose another name or dir"
        )


@contextmanager
def driver_lock(run_dir: Path, wait_s: float = _WAIT_S) -> Iterator[None]:
    """Be the only driver of a run folder, which is made if need be, until the block ends.

    While it is held, the file must not be opened in this process: closing it again would end the
    lock (POSIX).

    Args:
        wait_s: for a driver that is there, which may be just ending.

    Raises:
        ActorError: another driver works there; names it.
        DataError: the folder is not ours, or cannot be written.
    """
    require_own(run_dir)
    path, made = run_dir / LOCK, not run_dir.exists()
    descriptor, locks = _locked(path, wait_s)
    try:
        last = _read(descriptor)
        if last is not None:
            _take_over(last, path, locks)
        _write(descriptor, json.dumps(asdict(_this_process())) + "\n")
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
            if made and os.listdir(run_dir) == [LOCK]:  # refused before anything was begun
                path.unlink()
                with suppress(OSError):  # a newcomer has just put a lock of its own there
                    run_dir.rmdir()
    finally:
        os.close(descriptor)


def _locked(path: Path, wait_s: float) -> tuple[int, bool]:
    """Open the file and lock it; also whether the file system keeps locks."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written: {error.strerror}; correct the folder's rights, or "
                "choose another name or dir"
            ) from error
        try:
            locks = _lock(descriptor, path, wait_s)
        except BaseException:
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink:
            return descriptor, locks
        os.close(descriptor)  # it was removed with its empty folder, by who held it before


def _lock(descriptor: int, path: Path, wait_s: float) -> bool:
    """Lock the file; False where the file system keeps no locks."""
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning(
                    "%s: this file system keeps no locks (%s): of drivers on other machines only "
                    "those that have left their name there are seen", path, error.strerror
                )  # fmt: skip
                return False
            if time.monotonic() >= end:
                holder = _read(descriptor) or "another process"
                raise _occupied(path, holder) from error
            time.sleep(_LOOK_EVERY_S)
        else:
            return True


def _take_over(last: Holder, path: Path, locks: bool) -> None:
    """Name a driver that ended without a word; where there are no locks, see that it is gone."""
    here = last.host == socket.gethostname()
    if not locks and not here:
        raise ActorError(
            f"{path.parent}: another run may work in this folder ({last}), and this file system "
            f"keeps no locks: see that it has ended, then empty {path}"
        )
    if not locks and _lives(last):
        raise _occupied(path, last)
    log.warning("%s: the driver before ended without a word (%s); going on", path.parent, last)


def _occupied(path: Path, holder: object) -> ActorError:
    return ActorError(
        f"{path.parent}: another run works in this folder ({holder}); wait for it or stop it, or "
        "give this one another name"
    )


def _lives(holder: Holder) -> bool:
    whole_seconds = datetime.fromisoformat(holder.since).timestamp()
    return process_lives(holder.pid, whole_seconds + 1)


def _this_process() -> Holder:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Holder(host=socket.gethostname(), pid=os.getpid(), since=now)


def _read(descriptor: int) -> Holder | None:
    """Who is named in the file; None if nobody is, or it cannot be told."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (OSError, ValueError, TypeError):
        return None


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    os.fsync(descriptor)
