"""The console: progress bars of stages and benchmarks, and the PPO loop's live display."""

import time
from collections.abc import Iterator, Sequence
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

    def __init__(self, total: int, kinds: Sequence[Kind], console: Console | None = None) -> None:
        self._total = total
        self._kinds = kinds
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("PPO"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("PPO", total=total, left="first step")
        self._live: Live | None = None
        self._start = time.monotonic()
        self._seen = 0

    def update(self, report: StepReport) -> None:
        """Show one finished step."""
        self._seen += 1
        left = _left(time.monotonic() - self._start, self._seen, self._total - report.step)
        if self._live is None:
            line = Text.assemble(f"step {report.step}/{self._total}  ", _line(report), f"  {left}")
            self._console.print(line, soft_wrap=True)
            return
        self._progress.update(self._task, completed=report.step, left=left)
        self._live.update(Group(self._progress, _kinds(report, self._kinds), _line(report)))

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(self._progress, console=self._console, refresh_per_second=4)
            self._live.start()
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
    """Time left at the mean pace of this process, so that a resumed run is not too hopeful."""
    if remaining <= 0:
        return "done"
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


@contextmanager
def progress_bars(console: Console, *names: str, passing: bool = False) -> Iterator[Report]:
    """Show a bar per name. ``passing`` bars vanish at the end and are for terminals alone."""
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
        disable=passing and not console.is_terminal,
    )
    with bars:
        tasks = {name: bars.add_task(name, total=None, note="") for name in names}

        def report(done: int, total: int, name: str = "", note: str = "") -> None:
            bars.update(tasks[name or names[0]], completed=done, total=total, note=note)

        yield report
