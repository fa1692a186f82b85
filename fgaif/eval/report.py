"""The report of a run: ``report.json``, a page that stands alone, PNG plots, a console table."""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
from matplotlib.figure import Figure
from rich.table import Table

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
from fgaif.eval.run_results import PHASES, Phase
from fgaif.files import write_whole
from fgaif.tracking import Metric, explain
from fgaif.types import ImageRef, Json, PopeMetrics

EXAMPLES = 8
"""Images shown: the first ones of the held-out set, not chosen ones."""

_MAX_SIDE = 336
_COLOURS = {"better": "green", "worse": "red", "same": "dim", "": ""}


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
    figures = {
        "hallucination": errors_figure(results.evals),
        "ppo": curves_figure(results.steps, results.colours),
        "calibration": calibration_figure(results.rewards, results.colours),
    }
    for name, figure in figures.items():
        (folder / f"{name}.png").unlink(missing_ok=True)
        if figure is not None:
            save_png(figure, folder / f"{name}.png")
    tree = results.to_json(wall_seconds)
    write_whole(folder / "report.json", json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "report.html", render_html(results, tree, figures))
    return folder / "report.html"


def console_table(run_dir: Path) -> Table:
    """Before and after as a table for the console."""
    evals = read_run(run_dir).evals
    table = Table(title="held-out images, before and after", title_justify="left")
    table.add_column("")
    modes = MODES[::-1]
    for mode in modes:
        for column in PHASES:
            table.add_column(f"{mode}\n{column}", justify="right")
        table.add_column("\nchange", justify="right")
    sides = {mode: [getattr(evals.get(phase), mode, None) for phase in PHASES] for mode in modes}
    for rows in zip(*(compare(*sides[mode]) for mode in modes), strict=True):
        table.add_row(rows[0].figure.title, *[cell for row in rows for cell in _cells(row)])
    table.add_section()
    for row in compare(*[getattr(evals.get(phase), "pope", None) for phase in PHASES]):
        table.add_row(f"POPE {row.figure.title}", *_cells(row))
    return table


def _cells(row: Change) -> list[str]:
    colour = _COLOURS[row.verdict]
    change = f"[{colour}]{row.change}[/]" if colour and row.change else row.change
    return [row.before, row.after, change]


def render_html(results: RunOutcome, tree: Json, figures: dict[str, Figure | None]) -> str:
    """Render the page: no script, no link to elsewhere; every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fgaif.eval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    evals = results.evals
    tables = {
        mode: list(compare(*[getattr(evals.get(phase), mode, None) for phase in PHASES]))
        for mode in MODES[::-1]
    }
    return environment.get_template("report.html").render(
        results=results,
        tree=tree,
        tables=tables,
        pope=_pope_tables(results),
        kind_colours=results.colours,
        figures={name: to_svg(figure) for name, figure in figures.items() if figure is not None},
        metrics=list(_last_values(results)),
        examples=list(_examples(results)),
        phases=PHASES,
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
    return {name: list(compare(*pair)) for name, pair in sides.items()}


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
