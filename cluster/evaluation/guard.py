"""``fgaif eval guard``: other tools' results of general abilities, beside our own figures."""

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fgaif.eval.benchmark_results import benchmarks_in, read_scored
from fgaif.eval.benchmarks import load_benchmark
from fgaif.eval.guards import compare_guards, read_guards
from fgaif.files import write_whole
from fgaif.types import Json


def run_guard(
    after: Sequence[Path],
    before: Sequence[Path],
    beside: tuple[Path, Path] | None,
    out: Path | None,
    *,
    as_json: bool,
    console: Console,
) -> None:
    """Read the result files, compare them where there are those of before, and print.

    Raises:
        DataError: a file cannot be used, or the two models have no figure in common.
    """
    figures = read_guards(after)
    tree: Json = {"after": {name: guard.value for name, guard in figures.items()}}
    if before:
        tree |= compare_guards(read_guards(before), figures)
    if beside is not None:
        tree["beside"] = _ours(*beside)
    if out is not None:
        text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
        write_whole(out / "guard.json", text)
    if as_json:
        typer.echo(json.dumps(tree, ensure_ascii=False))
    else:
        _print(tree, console)


def _ours(before: Path, after: Path) -> Json:
    """The first figure of errors and what stands beside it, of each benchmark in both folders."""
    found: Json = {}
    theirs = benchmarks_in(after)
    for name in (name for name in benchmarks_in(before) if name in theirs):
        a, b = read_scored(before, name).metrics(), read_scored(after, name).metrics()
        coverage = load_benchmark(name).coverage
        first = next(iter(coverage), next(iter(a)))
        found[name] = {
            key: {"before": a[key], "after": b[key]}
            for key in (first, *coverage.get(first, ()))
            if key in a and key in b
        }
    return found


def _print(tree: Json, console: Console) -> None:
    table = Table(title="guards", title_justify="left", box=SIMPLE)
    for column in ("", "before", "after", "change", ""):
        table.add_column(column, justify="right" if column else "left")
    for name, value in tree["after"].items():
        row = tree.get("guards", {}).get(name)
        if row is None:
            table.add_row(name, "", f"{100 * value:.1f}", "", "")
            continue
        verdict = "dropped" if row["dropped"] else f"within {100 * row['reach']:.1f}"
        cells = (f"{100 * row[key]:.1f}" for key in ("before", "after"))
        style = "red" if row["dropped"] else ""
        table.add_row(name, *cells, f"{100 * row['difference']:+.1f}", verdict, style=style)
    for benchmark, figures in tree.get("beside", {}).items():
        table.add_section()
        for key, pair in figures.items():
            change = pair["after"] - pair["before"]
            cells = (f"{pair[side]:.3f}" for side in ("before", "after"))
            table.add_row(f"{benchmark} {key}", *cells, f"{change:+.3f}", "")
    console.print(table)
    if only := tree.get("only_in_one"):
        console.print(f"beware: only in one of the two: {', '.join(only)}", style="yellow")
