"""The console: progress bars of stages and benchmarks, and the PPO loop's live display."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fgaif.tracking import explain
from fgaif.types import Kind, StepReport

_STARTING = "starting learner, reference and rewards, then the first step"
_QUARTERS = 4
_PACE_S = 900.0
"""A round of a slow engine takes minutes, and a pace needs two of them."""
_PER_KIND = {"reward": "reward", "hallu": "hallucinated"}
_SCALARS = {
    "kl/response": "KL",
    "length/tokens": "length",
    "policy/clip_frac": "clipped",
    "mismatch/mean": "mismatch",
    "sync/arrived": "arrived",
    "seconds/total": "s/step",
    "tokens_per_second": "tokens/s",
}


class StepDisplay:
    """Shows the last step's key metrics and the time left; a context manager.

    Values outside their healthy range are shown in yellow.
    """

    def __init__(
        self,
        total: int,
        kinds: Sequence[Kind],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._kinds = kinds
        self._clock = clock
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("PPO"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("PPO", total=total, left=_STARTING)
        self._live: Live | None = None
        self._first: float | None = None
        self._done_before = 0

    def update(self, report: StepReport) -> None:
        """Show one finished step."""
        now = self._clock()
        if self._first is None:
            self._first, self._done_before = now, report.step
        left = _left(now - self._first, report.step - self._done_before, self._total - report.step)
        if self._live is None:
            parts = (_kinds_line(report, self._kinds), _line(report))
            line = Text.assemble(f"step {report.step}/{self._total}  ", *parts, f"  {left}")
            self._console.print(line, soft_wrap=True)
            return
        self._progress.update(self._task, completed=report.step, left=left)
        self._live.update(Group(self._progress, _kinds(report, self._kinds), _line(report)))

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self._progress, console=self._console, refresh_per_second=4)
            self._live.start()
        else:
            self._console.print(f"PPO, {self._total} steps: {_STARTING}", soft_wrap=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()


def _left(elapsed: float, seen: int, remaining: int) -> str:
    """Time left at the mean pace since the first step of this process was done: neither the start
    of actors nor steps of an earlier process count."""
    if remaining <= 0:
        return "done"
    if not seen:
        return f"{remaining} steps left"
    minutes, seconds = divmod(round(elapsed / seen * remaining), 60)
    return f"{minutes}:{seconds:02d} left"


def _kinds(report: StepReport, kinds: Sequence[Kind]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for group, title in _PER_KIND.items():
        table.add_row(title, *[_value(report, f"{group}/{kind}") for kind in kinds])
    return table


def _kinds_line(report: StepReport, kinds: Sequence[Kind]) -> Text:
    """Reward and hallucinated share of each kind, for a console that shows no table."""
    line = Text()
    for group, title in _PER_KIND.items():
        known = [kind for kind in kinds if f"{group}/{kind}" in report.metrics]
        if known:
            line.append(f"{title} ", "dim")
        for kind in known:
            line.append_text(Text.assemble((f"{kind} ", "dim"), _value(report, f"{group}/{kind}")))
            line.append("  ")
    return line


def _line(report: StepReport) -> Text:
    line = Text()
    for name, title in _SCALARS.items():
        if name in report.metrics:
            line.append_text(Text.assemble("  " if line else "", (f"{title} ", "dim")))
            line.append_text(_value(report, name))
    return line


def _value(report: StepReport, name: str) -> Text:
    value = report.metrics.get(name)
    if value is None:
        return Text("-", "dim")
    entry = explain(name)
    return Text(_short(value), "" if entry is None or entry.ok(value) else "yellow")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Report(Protocol):
    """Moves a bar; the first one, unless another is named."""

    def __call__(self, done: int, total: int, name: str = "", note: str = "") -> None:
        """Show ``done`` of ``total``, and a note behind the bar."""


class _Note(ProgressColumn):
    """The note on one line; it is what a narrow screen cuts, not the bar or the time left."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class _Lines:
    """What a bar would say, as lines of a log: its first note, and every quarter of the work."""

    def __init__(self, name: str, console: Console) -> None:
        self._name = name
        self._console = console
        self._start = time.monotonic()
        self._said = (-1, "")

    def show(self, done: int, total: int, note: str) -> None:
        quarter = _QUARTERS * done // total if total else _QUARTERS
        if quarter == self._said[0] and (done or note == self._said[1]):
            return
        self._said = quarter, note
        seconds = f"{time.monotonic() - self._start:.0f} s" if done else ""
        text = ", ".join(filter(None, [f"{self._name}: {done:,} of {total:,}", seconds, note]))
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bars(console: Console, *names: str, passing: bool = False) -> Iterator[Report]:
    """Show a bar per name. ``passing`` bars vanish at the end and are for terminals alone.

    Without a terminal a line tells what is being started, and one each quarter how far it is. The
    time left is computed from when the first were done, so that starting engines do not count.
    """
    lines = (
        {} if console.is_terminal or passing else {name: _Lines(name, console) for name in names}
    )
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        _Note(),
        console=console,
        transient=passing,
        disable=not console.is_terminal,
        speed_estimate_period=_PACE_S,
    )
    with bars:
        tasks = {name: bars.add_task(name, total=None, note="") for name in names}

        def report(done: int, total: int, name: str = "", note: str = "") -> None:
            bars.update(tasks[name or names[0]], completed=done, total=total, note=note)
            if lines:
                lines[name or names[0]].show(done, total, note)

        yield report
