"""Results and comparisons as tables: console, Markdown, and a page that stands alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from fgaif.chat.images import data_uri
from fgaif.data.images import image_ref
from fgaif.errors import DataError
from fgaif.eval.benchmark_results import worst_items
from fgaif.eval.benchmarks import load_benchmark
from fgaif.eval.figures import Figure, find_figure, group_of, title_of
from fgaif.eval.images import ImageFolder
from fgaif.eval.scored import Scored
from fgaif.eval.uncertainty import Comparison, Estimate
from fgaif.types import Json

WORST = 8
_MAX_SIDE = 336
_SIGNIFICANT = 0.05
_COLOURS = {"better": "green", "worse": "red", "": ""}
_DASH = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureRow:
    """One figure: its cells as text, where it lies, and whether a change is for the better.

    ``bar`` holds low, value and high in [0, 1] of the drawn axis; None where there is no interval.
    """

    benchmark: str
    group: str
    title: str
    meaning: str
    cells: tuple[str, ...]
    bar: tuple[float, float, float] | None
    scale: tuple[str, str]
    """The ends of the bar's axis, as text."""
    verdict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureTable:
    """A table of figures. ``axis`` says what the bars span, ``notes`` stand below; ``centred``: 0
    lies in the middle of the axis."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[FigureRow, ...]
    axis: str
    notes: tuple[str, ...]
    centred: bool = False


def results_table(
    title: str, results: Sequence[tuple[Scored, Mapping[str, Estimate]]]
) -> FigureTable:
    """Lay out one model's figures with their intervals."""
    lines = [
        FigureRow(
            benchmark=scored.benchmark,
            group=group_of(name),
            title=title_of(figure, name),
            meaning=figure.meaning,
            cells=(figure.show(estimate.value), _interval(estimate, figure)),
            bar=_bar(estimate, 0.0, top),
            scale=(_end(figure, 0.0), _end(figure, top)),
        )
        for scored, estimates in results
        for name, estimate in estimates.items()
        if not _repeats(name, estimates) and not _empty(name, estimate.value)
        for figure in [_figure(scored.benchmark, name)]
        for top in [_top(scored.benchmark, figure, estimates)]
    ]
    return FigureTable(
        title=title,
        columns=("figure", "value", "95 % interval"),
        lines=tuple(lines),
        axis="from 0 to 100 %, or to the highest of the benchmark",
        notes=tuple(note for scored, _ in results for note in _notes(scored)),
    )


def comparison_table(title: str, comparisons: Sequence[Comparison]) -> FigureTable:
    """Lay out two models' figures on the same items, the difference and its p-value."""
    lines = []
    for comparison in comparisons:
        known = [d.difference for d in comparison.figures.values()]
        for name, found in comparison.figures.items():
            if _repeats(name, comparison.figures) or _empty(name, found.difference.value):
                continue
            figure = _figure(comparison.benchmark, name)
            reach = _reach(known, name, comparison)
            lines.append(
                FigureRow(
                    benchmark=comparison.benchmark,
                    group=group_of(name),
                    title=title_of(figure, name),
                    meaning=figure.meaning,
                    cells=(
                        figure.show(found.a),
                        figure.show(found.b),
                        _signed(figure, found.difference.value),
                        _interval(found.difference, figure, sign="+"),
                        _p(found.p),
                        _p(found.p_holm),
                    ),
                    bar=_bar(found.difference, -reach, reach),
                    scale=(_end(figure, -reach), _end(figure, reach, sign="+")),
                    verdict=_verdict(figure, found.difference.value, found.p_holm),
                )
            )
    return FigureTable(
        title=title,
        columns=("figure", "A", "B", "B − A", "95 % interval", "p", "p (Holm)"),
        lines=tuple(lines),
        axis="difference, 0 in the middle, all shares of a benchmark on one scale",
        notes=tuple(_comparison_notes(comparisons)),
        centred=True,
    )


def for_console(table: FigureTable) -> Group:
    """Lay out a table for the console, a section per benchmark; fits into 80 columns."""
    drawn = RichTable(title=table.title, title_justify="left", box=SIMPLE)
    drawn.padding = (0, 1, 0, 0)
    drawn.add_column(table.columns[0])
    for column in table.columns[1:]:
        drawn.add_column(column, justify="right", no_wrap=True)
    for line, new_benchmark, new_group in _with_headings(table.lines):
        if new_benchmark:
            drawn.add_section()
            drawn.add_row(Text(line.benchmark, style="bold"))
        if new_group:
            drawn.add_row(Text(f" {line.group}", style="italic"))
        style = _COLOURS[line.verdict]
        drawn.add_row(Text(f"  {line.title}"), *[Text(cell, style=style) for cell in line.cells])
    return Group(drawn, Text("\n".join(table.notes), style="dim"))


def markdown(table: FigureTable) -> str:
    """Write a table as a Markdown table with its notes."""
    columns = ["benchmark", *table.columns]
    rows = [columns, ["---", "---", *["---:"] * (len(columns) - 2)]]
    rows += [[line.benchmark, _full(line), *line.cells] for line in table.lines]
    lines = "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)
    notes = "".join(f"- {note}\n" for note in table.notes)
    return f"### {table.title}\n\n{lines}\n\n{notes}"


def render_page(
    title: str, tables: Sequence[FigureTable], worst: Mapping[str, Sequence[Json]]
) -> str:
    """Render a page without script or link: tables, bars, the worst items with their images.

    ``worst`` maps a heading to items whose ``image`` is a data URI or None (``show_items``).
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fgaif.eval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("benchmarks.html.jinja").render(
        title=title,
        tables=[(table, list(_with_scales(table.lines))) for table in tables],
        worst=worst,
    )


def show_items(scored: Scored, images: Path | None, count: int = WORST) -> list[Json]:
    """The worst items with their images embedded, small.

    Images are looked for under ``images`` by path and by name, else by path in the working folder.
    Where one cannot be shown, ``alt`` says why.
    """
    chosen = worst_items(scored, count)
    folder = ImageFolder(images) if images is not None else None
    return [_shown(item, folder) for item in chosen]


def _shown(item: Json, folder: ImageFolder | None) -> Json:
    name = str(item.get("image", ""))
    rest = {key: value for key, value in item.items() if key != "image" and value not in (None, "")}
    try:
        ref = folder.check(name) if folder is not None else image_ref(name, Path())
        return {"image": data_uri(ref, _MAX_SIDE), "alt": Path(ref.path).name, "fields": rest}
    except DataError:
        return {"image": None, "alt": f"{name or 'no image named'}: not found", "fields": rest}


def _empty(name: str, value: float | None) -> bool:
    """Whether a figure of a group says nothing, because nothing belongs to the group."""
    return "/" in name and (value is None or (name.endswith("/items") and not value))


def _signed(figure: Figure, value: float | None) -> str:
    return _DASH if value is None else figure.change(0.0, value).partition(" (")[0]


def _interval(estimate: Estimate, figure: Figure, sign: str = "") -> str:
    return figure.show_range(estimate.low, estimate.high, sign)


def _repeats(name: str, figures: Mapping[str, object]) -> bool:
    """Whether a figure only repeats another: by a rule that made no difference, or as the one
    group that there is."""
    group, slash, key = name.rpartition("/")
    plain = f"{group}{slash}{key.partition('_')[2]}"
    if plain in figures and figures[plain] == figures[name]:
        return True
    groups = {other.rpartition("/")[0] for other in figures if "/" in other}
    return len(groups) == 1 and figures.get(key) == figures[name] and bool(group)


def _p(value: float | None) -> str:
    if value is None:
        return _DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _verdict(figure: Figure, difference: float | None, p: float | None) -> str:
    """Better or worse only where the corrected test says that there is a difference at all."""
    if difference is None or p is None or p >= _SIGNIFICANT or not figure.better:
        return ""
    return "better" if difference * figure.better > 0 else "worse"


def _figure(benchmark: str, name: str) -> Figure:
    return find_figure(load_benchmark(benchmark).figures, name)


def _top(benchmark: str, figure: Figure, estimates: Mapping[str, Estimate]) -> float:
    if figure.share:
        return 1.0
    return _highest(e for other, e in estimates.items() if _figure(benchmark, other) == figure)


def _reach(known: Sequence[Estimate], name: str, comparison: Comparison) -> float:
    figure = _figure(comparison.benchmark, name)
    others = [_figure(comparison.benchmark, other) for other in comparison.figures]
    alike = [
        estimate
        for estimate, other in zip(known, others, strict=True)
        if other == figure or (figure.share and other.share)
    ]
    return _highest(alike)


def _highest(estimates: Iterable[Estimate]) -> float:
    ends = [abs(v) for e in estimates for v in (e.low, e.value, e.high) if v is not None]
    return max(ends, default=0.0) or 1.0


def _end(figure: Figure, value: float, sign: str = "") -> str:
    """An end of an axis: no more digits than it needs."""
    text = f"{100 * value:{sign}.3g} %" if figure.share else f"{value:{sign}.3g}"
    return text.replace("-", "−")


def _bar(estimate: Estimate, low: float, high: float) -> tuple[float, float, float] | None:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return None
    span = high - low
    return (
        (estimate.low - low) / span,
        (estimate.value - low) / span,
        (estimate.high - low) / span,
    )


def _notes(scored: Scored) -> Iterator[str]:
    units = len(set(scored.units))
    about = [f"{scored.benchmark}: {len(scored.ids)} items, {units} resampled units"]
    about += [f"{key} {value}" for key, value in scored.provenance.items()]
    yield ", ".join(about)
    left_out = [f"{n} {reason.replace('_', ' ')}" for reason, n in scored.counts.items() if n]
    if left_out:
        yield f"{scored.benchmark}, counted: {', '.join(left_out)}"
    yield from (f"beware: {warning}" for warning in scored.warnings)


def _comparison_notes(comparisons: Sequence[Comparison]) -> Iterator[str]:
    for found in comparisons:
        yield (
            f"{found.benchmark}: {found.common} items in both, {found.only_a} only in A, "
            f"{found.only_b} only in B"
        )
        yield from (f"beware: {warning}" for warning in found.warnings)


def _with_headings(lines: Sequence[FigureRow]) -> Iterator[tuple[FigureRow, bool, bool]]:
    """Lines, whether a benchmark begins with it, and whether a group of figures does."""
    before: FigureRow | None = None
    for line in lines:
        new = before is None or line.benchmark != before.benchmark
        yield line, new, bool(line.group) and (new or before is None or line.group != before.group)
        before = line


def _with_scales(
    lines: Sequence[FigureRow],
) -> Iterator[tuple[FigureRow, bool, bool, bool]]:
    """Like :func:`_with_headings`, and whether the scale below a bar is to be shown: on the last
    row of those in a benchmark that have the same."""
    rows = list(_with_headings(lines))
    for (line, benchmark, group), after in zip(rows, [*rows[1:], None], strict=True):
        last = after is None or after[1] or after[0].scale != line.scale
        yield line, benchmark, group, last


def _full(line: FigureRow) -> str:
    return f"{line.group}: {line.title}" if line.group else line.title


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
