"""The report of a run: ``report.json``, a page that stands alone, PNG plots, a console table."""

import base64
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fgaif.data.images import load_image
from fgaif.errors import DataError
from fgaif.eval.before_after import Change, compare
from fgaif.eval.plots import (
    calibration_figure,
    curves_figure,
    errors_figure,
    save_png,
    to_svg,
)
from fgaif.eval.policy import MODES, Mode
from fgaif.eval.run_folder import RunOutcome, read_run
from fgaif.eval.run_results import ORACLE, PHASES, REWARDS, Phase
from fgaif.files import write_whole
from fgaif.tracking import Metric, explain
from fgaif.types import ImageRef, Json, PopeMetrics

NARROW = "_narrow"
"""After the names of figures that are drawn for a narrow page."""
_NO_VIEW = ("length", "repetition", "malformed")
"""Figures that depend on no judge: shown once."""
EXAMPLES = 8
"""Images shown: the first ones of the held-out set, not chosen ones."""

_MAX_SIDE = 336
_COLOURS = {"better": "green", "worse": "red", "unclear": "dim", "": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An image and its captions; ``image`` is a data URI, or None with the reason in ``alt``."""

    image: str | None
    alt: str
    prompt: str
    captions: dict[Mode, dict[Phase, Json | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastValue:
    """A metric of the PPO loop at its first and last step."""

    name: str
    first: float
    last: float
    entry: Metric | None


def build_report(run_dir: Path, wall_seconds: float | None = None) -> Path:
    """Write ``report/report.{json,html}`` and the plots from what the stages left behind.

    Parts that are missing are named in both files. ``wall_seconds`` is the whole run's time where
    somebody measured it. Returns the path of the page.

    Raises:
        DataError: there is no such run folder, or a file in it is broken.
    """
    results = read_run(run_dir)
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(results)
    for name, figure in figures.items():
        if not name.endswith(NARROW):
            (folder / f"{name}.png").unlink(missing_ok=True)
            if figure is not None:
                save_png(figure, folder / f"{name}.png")
    tree = results.to_json(wall_seconds)
    write_whole(folder / "report.json", json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "report.html", render_html(results, tree, figures))
    return folder / "report.html"


def draw_figures(results: RunOutcome) -> dict[str, Figure | None]:
    """The report's figures by name, each for a wide page and, as ``NAME_narrow``, for a narrow."""
    colours, judge = results.colours, results.judge
    figures: dict[str, Figure | None] = {}
    for suffix, narrow in (("", False), (NARROW, True)):
        figures |= {
            f"hallucination{suffix}": errors_figure(
                results.evals, judge, results.spreads, narrow=narrow
            ),
            f"ppo{suffix}": curves_figure(results.steps, colours, narrow=narrow),
            f"calibration{suffix}": calibration_figure(results.rewards, colours, narrow=narrow),
        }
    return figures


def console_table(run_dir: Path) -> Group:
    """Before and after as tables for the console, one per judge and mode; 80 columns wide."""
    results = read_run(run_dir)
    if not results.evals:
        return Group(Text("no evaluation yet: run `fgaif eval run`"))
    parts = [_console_part(title, rows) for title, rows in _tables(results)]
    for strategy, rows in _pope_tables(results).items():
        if strategy == "mean":
            parts.append(_console_part("POPE, mean of the strategies", rows))
    note = "[95 % intervals]: bootstrap over images, of the change paired; a change is called"
    return Group(*parts, Text(f"{note} better or worse where its interval leaves out zero."))


def _console_part(title: str, rows: Iterable[Change]) -> Group:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        if row.known:
            table.add_row(row.figure.title, *_cells(row))
    return Group(Text(title, style="italic"), table)


def _tables(results: RunOutcome) -> Iterator[tuple[str, list[Change]]]:
    """Title and rows of each mode as the judge sees it, then as each of the others does."""
    evals = [results.evals.get(phase) for phase in PHASES]
    names = dict.fromkeys(name for found in evals if found for name in found.others)
    for mode in MODES[::-1]:
        sides = [getattr(found, mode, None) for found in evals]
        title = f"{mode} captions, judged by {results.judge}"
        yield title, list(compare(*sides, spreads=results.spreads.get(mode)))
    for name in names:
        for mode in MODES[::-1]:
            sides = [getattr(found and found.others.get(name), mode, None) for found in evals]
            spreads = results.other_spreads.get(name, {}).get(mode)
            rows = [
                row for row in compare(*sides, spreads=spreads) if row.figure.key not in _NO_VIEW
            ]
            note = ", which PPO optimised" if name == REWARDS else ""
            yield f"{mode} captions, as {name} see them{note}", rows


def _cells(row: Change) -> list[str]:
    colour = _COLOURS[row.verdict]
    change = f"[{colour}]{row.change}[/]" if colour and row.change else row.change
    texts = (row.before, row.after, change)
    return [
        f"{text}\n[dim]{escape(spread)}[/]" if spread else text
        for text, spread in zip(texts, row.ranges, strict=True)
    ]


def render_html(results: RunOutcome, tree: Json, figures: dict[str, Figure | None]) -> str:
    """Render the page: no script, no link to elsewhere; every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fgaif.eval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        results=results,
        tree=tree,
        tables=list(_tables(results)) if results.evals else [],
        pope=_pope_tables(results),
        kind_colours=results.colours,
        figures={
            name: to_svg(figure, name) for name, figure in figures.items() if figure is not None
        },
        metrics=list(_last_values(results)),
        examples=list(_examples(results)),
        phases=PHASES,
        self_graded=results.judge == REWARDS,
        judging={phase: found.judging for phase, found in results.evals.items() if found.judging},
        oracle=ORACLE,
    )


def _pope_tables(results: RunOutcome) -> dict[str, list[Change]]:
    """POPE's figures by strategy, the mean first; empty without POPE."""
    sides: dict[str, list[PopeMetrics | None]] = {}
    evals = [results.evals.get(phase) for phase in PHASES]
    names = {name: None for found in evals if found is not None for name in found.pope_by_strategy}
    if any(found is not None and found.pope is not None for found in evals):
        sides["mean"] = [found.pope if found else None for found in evals]
    for name in names:
        sides[name] = [found.pope_by_strategy.get(name) if found else None for found in evals]
    return {
        name: list(compare(*pair, spreads=results.pope_spreads.get(name)))
        for name, pair in sides.items()
    }


def _last_values(results: RunOutcome) -> Iterator[LastValue]:
    for name in sorted({name for step in results.steps for name in step.metrics}):
        values = [step.metrics[name] for step in results.steps if name in step.metrics]
        yield LastValue(name=name, first=values[0], last=values[-1], entry=explain(name))


def _examples(results: RunOutcome) -> Iterator[Example]:
    """Pair the captions of the first images by prompt, both modes, both phases."""
    table = {
        (phase, row["mode"], row["id"]): row
        for phase, rows in results.captions.items()
        for row in rows
    }
    ids = list(dict.fromkeys(prompt_id for _, _, prompt_id in table))[:EXAMPLES]
    for prompt_id in ids:
        captions: dict[Mode, dict[Phase, Json | None]] = {
            mode: {phase: table.get((phase, mode, prompt_id)) for phase in PHASES}
            for mode in MODES[::-1]
        }
        row = next(row for (_, _, found), row in table.items() if found == prompt_id)
        image, alt = _embed(ImageRef(path=row["image"], sha256=row["sha256"]))
        yield Example(image=image, alt=alt, prompt=row["prompt"], captions=captions)


def _embed(ref: ImageRef) -> tuple[str | None, str]:
    """Return the image as a data URI and its name, or None and why it cannot be shown."""
    try:
        image = load_image(ref)
    except DataError as error:  # a moved image must not cost the whole report
        return None, str(error)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    small = max(image.size) <= 128
    stream = io.BytesIO()
    image.save(stream, format="PNG" if small else "JPEG", quality=88)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f"data:image/{'png' if small else 'jpeg'};base64,{data}", Path(ref.path).name
