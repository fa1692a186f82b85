"""Progress bars of stages and benchmarks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
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
from rich.text import Text


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
