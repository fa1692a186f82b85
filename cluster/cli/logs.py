"""``fgaif logs``: what the driver and the actors of a run have logged, in the order of time."""

import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from cluster.monitoring.status import driver_is_alive, read_run_address, read_status
from fgaif.errors import DataError

out = Console()

_FOLLOW_EVERY_S = 0.5
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}(?= )")


def logs(
    run: Annotated[str, typer.Argument(help="Folder of the run, or its name under ./runs.")],
    of: Annotated[
        str | None,
        typer.Argument(metavar="[ROLE|ACTOR]", help="rollout, rollout-0, driver ...; else all."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the run ends.")] = False,
    lines: Annotated[int | None, typer.Option("-n", min=0, help="Only the last N lines.")] = None,
) -> None:
    """Print what a run's actors have logged, merged by time, after the name of each.

    Actors are called as in `fgaif status`; files are read as they are, so this needs no cluster.
    """
    folder = _find(run)
    files: dict[str, _File] = {}
    _open_new(files, folder, of)
    if not files:
        there = ", ".join(path.stem for path in _logs(folder))
        raise DataError(f"{run}: nothing is called {of}; there are: {there}")
    now = _merge(files, whole_lines=follow)
    _print(now if lines is None else now[max(0, len(now) - lines) :], files)
    with suppress(KeyboardInterrupt):
        while follow:
            follow = _lives(folder)  # before the last look
            if follow:
                time.sleep(_FOLLOW_EVERY_S)
            _open_new(files, folder, of)
            _print(_merge(files, whole_lines=follow), files)


class _Line(NamedTuple):
    stamp: str
    actor: str
    text: str


class _File:
    """An actor's log, read from where the last reading stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0
        self._stamp = ""

    def read(self, *, whole_lines: bool) -> Iterator[_Line]:
        """New lines; one without a time (of a traceback, say) has that of the line before it."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                new = file.read()
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({error.strerror})") from error
        if whole_lines:
            new = new[: new.rfind(b"\n") + 1]
        self._at += len(new)
        for text in new.decode(errors="replace").splitlines():
            stamp = _STAMP.match(text)
            self._stamp = stamp.group() if stamp else self._stamp
            yield _Line(self._stamp, self._path.stem, text)


def _find(run: str) -> Path:
    for folder in (Path(run), Path("runs") / run):
        if _logs(folder):
            return folder
    if Path(run).is_dir():
        why = "it has not started, or they are in that folder on the nodes where its actors ran"
        raise DataError(f"{run}: no logs in it; {why}")
    raise DataError(f"{run}: no such run folder; `fgaif list` shows runs")


def _logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("logs/*.log"))


def _open_new(files: dict[str, _File], folder: Path, of: str | None) -> None:
    """Add the files of the role or actor that are not open yet: engines come and go."""
    for path in _logs(folder):
        if of is None or path.stem == of or path.stem.startswith(f"{of}-"):
            files.setdefault(path.stem, _File(path))


def _merge(files: dict[str, _File], *, whole_lines: bool) -> list[_Line]:
    found = [line for file in files.values() for line in file.read(whole_lines=whole_lines)]
    return sorted(found, key=lambda line: line.stamp)


def _print(lines: Sequence[_Line], files: Collection[str]) -> None:
    width = max(map(len, files))
    for line in lines:
        out.print(
            f"{line.actor:{width}}  {line.text}", markup=False, highlight=False, soft_wrap=True
        )


def _lives(folder: Path) -> bool:
    """Whether the run goes on: not said to have ended, nor its driver gone from this machine."""
    status, live = read_status(folder), read_run_address(folder)
    if live is None or (status is not None and status.state != "running"):
        return False
    return driver_is_alive(live) is not False
