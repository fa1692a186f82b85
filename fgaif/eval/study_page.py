"""A study as tables for the console, a page that stands alone, PNG plots, and a LaTeX table."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from fgaif.eval.plots import INK, STYLE, laid_out, save_png, to_svg
from fgaif.eval.study import verdict
from fgaif.files import write_whole
from fgaif.kinds import words
from fgaif.types import Json

SHOWN = ("any", "recall", "true_facts", "length", "repetition", "greedy_any", "pope_f1")
"""Figures of the tables, after those of the kinds."""
_COSTS = {
    "samples": "responses", "tokens": "tokens", "seconds": "seconds",
    "reward_calls": "reward-model calls", "verifier_questions": "questions to the verifier",
}  # fmt: skip
_COLOURS = (
    "#2a78d6", "#d6592a", "#2a9d6f", "#9b4fc2", "#c28f1e", "#d23f7c", "#4fa3b5", "#7a6a58",
    "#5b5fc7", "#8a9a3b", "#b04a4a", "#708090",
)  # fmt: skip
_Place = Callable[[Json, int], float]
"""Where a run's step lies on the horizontal axis."""


def console_tables(study: Json) -> list[Table]:
    """Equal steps, matched KL, differences from the first variant, costs, and what failed."""
    tables = [_figures_table(study)]
    if study["against_first"]:
        tables.append(_against_table(study))
    if study["matched_kl"]:
        tables.append(_matched_table(study))
    tables.append(_costs_table(study))
    failed = [run for run in study["runs"] if run["failure"]]
    if failed:
        table = Table("variant", "seed", "why there is no result", title="not finished")
        for run in failed:
            table.add_row(run["variant"], str(run["seed"]), run["failure"])
        tables.append(table)
    return tables


def shown_figures(study: Json) -> list[str]:
    """Names of the figures that the evaluation knows, kinds first."""
    names = (*study["kinds"], *SHOWN)
    return [name for name in names if study["before"].get(name) is not None]


def cell(found: Json | None, digits: int = 3) -> str:
    """A mean with its half-width, as text; a dash where there is none."""
    if not found:
        return "–"
    if found["half_width"] is None:
        return f"{found['mean']:.{digits}f}"
    return f"{found['mean']:.{digits}f} ± {found['half_width']:.{digits}f}"


def _figures_table(study: Json) -> Table:
    title = "at equal steps: mean ± 95 % over the seeds that finished"
    table = Table("figure", "before", *study["equal_steps"], title=title)
    for name in shown_figures(study):
        cells = (cell(figures.get(name)) for figures in study["equal_steps"].values())
        table.add_row(name, f"{study['before'][name]:.3f}", *cells)
    return table


def _against_table(study: Json) -> Table:
    table = Table(
        "variant", "seeds", "any by seed", "p", "any by image", "p (Holm)", "reading",
        title=f"difference from {study['first']} in `any`: paired by seed, and by image",
    )  # fmt: skip
    for variant, found in study["against_first"].items():
        table.add_row(variant, *against_cells(found))
    return table


def against_cells(found: Json) -> list[str]:
    """Cells of a variant's difference from the first in ``any``."""
    seeds, images = found["figures"].get("any"), found["images"]
    return [
        str(len(found["seeds"])),
        cell(seeds),
        _p(seeds["p"] if seeds else None),
        f"{images['mean']:+.3f} [{images['low']:+.3f}, {images['high']:+.3f}]"
        if images and images["low"] is not None
        else "–",
        _p(found.get("p_holm")),
        verdict(seeds) if seeds else "–",
    ]


def _matched_table(study: Json) -> Table:
    title = f"at the KL that both reach: {study['first']}, and each other variant, in `any`"
    table = Table("variant", study["first"], "variant's own", "difference", "p", title=title)
    for variant, figures in study["matched_kl"].items():
        if found := figures.get("any"):
            difference = found["difference"]
            table.add_row(
                variant, cell(found["first"]), cell(found), cell(difference), _p(difference["p"])
            )
    return table


def _costs_table(study: Json) -> Table:
    known = [name for name in _COSTS if any(name in row for row in study["costs"].values())]
    table = Table("variant", *(_COSTS[name] for name in known), title="cost of a training, mean")
    for variant, row in study["costs"].items():
        table.add_row(variant, *(cell_count(row.get(name)) for name in known))
    return table


def cell_count(found: Json | None) -> str:
    """A large number as text."""
    return f"{found['mean']:,.0f}" if found else "–"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< .001" if value < 0.001 else f"{value:.3f}"


def write_page(run_dir: Path, name: str, study: Json) -> Path:
    """Write ``study.html``, ``study.tex`` and ``study_*.png`` into the run; the page's path."""
    figures = {name: figure for name, figure in _figures(study).items() if figure is not None}
    for title, figure in figures.items():
        save_png(figure, run_dir / f"study_{title}.png")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fgaif.eval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("study.html").render(
        name=name,
        study=study,
        shown=shown_figures(study),
        costs={k: v for k, v in _COSTS.items() if any(k in row for row in study["costs"].values())},
        figures={title: to_svg(figure) for title, figure in figures.items()},
        words=words,
        cell=cell,
        cell_count=cell_count,
        against_cells=against_cells,
        p=_p,
    )
    write_whole(run_dir / "study.html", page)
    write_whole(run_dir / "study.tex", latex_table(study))
    return run_dir / "study.html"


def latex_table(study: Json) -> str:
    """The table at equal steps for a paper; needs the package booktabs."""
    names = shown_figures(study)
    lines = [
        "\\begin{tabular}{l" + "r" * len(names) + "}",
        "\\toprule",
        " & ".join(["", *(_tex(words(name)) for name in names)]) + " \\\\",
        "\\midrule",
        " & ".join(["before", *(f"{study['before'][name]:.3f}" for name in names)]) + " \\\\",
    ]
    for variant, figures in study["equal_steps"].items():
        cells = [_tex_cell(figures.get(name)) for name in names]
        lines.append(" & ".join([_tex(variant), *cells]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _tex_cell(found: Json | None) -> str:
    if not found:
        return "--"
    if found["half_width"] is None:
        return f"{found['mean']:.3f}"
    return f"${found['mean']:.3f} \\pm {found['half_width']:.3f}$"


def _tex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


# --- plots ----------------------------------------------------------------------------------------


def _figures(study: Json) -> dict[str, Figure | None]:
    finished = [run for run in study["runs"] if not run["failure"]]
    trained = [run for run in finished if run["kl_by_step"]]
    colours = dict(zip(study["equal_steps"], _COLOURS * 9, strict=False))
    return {
        "kl": _paths(study, trained, colours, "KL to the reference per response", _kl_at),
        "samples": _paths(study, trained, colours, "responses sampled", _samples_at),
        "recall": _recall(study, finished, colours),
        "cost": _cost(study, colours),
    }


def _kl_at(run: Json, step: int) -> float:
    return float(run["kl_by_step"].get(str(step), run["kl"]))


def _samples_at(run: Json, step: int) -> float:
    return float(run["costs"]["samples"] * step / max(map(int, run["kl_by_step"])))


def _paths(
    study: Json, runs: Sequence[Json], colours: Mapping[str, str], label: str, place: _Place
) -> Figure | None:
    """Errors on held-out images of every evaluated checkpoint, a line for each run."""
    if not runs or study["before"].get("any") is None:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        named: set[str] = set()
        for run in runs:
            steps = sorted(map(int, run["at"]))
            points = [(0.0, study["before"]["any"])]
            points += [(place(run, step), run["at"][str(step)]["any"]) for step in steps]
            colour = colours[run["variant"]]
            axes.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=1)
            axes.plot(
                *points[-1],
                color=colour,
                marker="o",
                markersize=5,
                linestyle="",
                label=None if run["variant"] in named else run["variant"],
            )
            named.add(run["variant"])
        _finish(axes, label, "hallucinated share, held-out images")
        return laid_out(figure)


def _recall(study: Json, runs: Sequence[Json], colours: Mapping[str, str]) -> Figure | None:
    """Object recall against errors: fewer errors by saying less would go down and left."""
    before = study["before"]
    if not runs or before.get("recall") is None:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(before["any"], before["recall"], "D", color=INK, markersize=6, label="before")
        for variant, colour in colours.items():
            own = [run["figures"] for run in runs if run["variant"] == variant]
            if not own:
                continue
            x, y = [f["any"] for f in own], [f["recall"] for f in own]
            axes.plot(x, y, "o", color=colour, alpha=0.35, markersize=4)
            mean = sum(x) / len(x), sum(y) / len(y)
            axes.plot(*mean, "o", color=colour, markersize=8, label=variant)
        _finish(axes, "hallucinated share, held-out images", "object recall", from_zero=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return laid_out(figure)


def _cost(study: Json, colours: Mapping[str, str]) -> Figure | None:
    known = {v: row for v, row in study["costs"].items() if "seconds" in row}
    if not known:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.35 * len(known)), layout="constrained")
        axes = figure.subplots()
        names = list(known)[::-1]
        axes.barh(
            names,
            [known[name]["seconds"]["mean"] for name in names],
            xerr=[known[name]["seconds"]["half_width"] or 0.0 for name in names],
            color=[colours[name] for name in names],
            error_kw={"ecolor": INK, "linewidth": 1},
        )
        axes.set_xlabel("seconds of a training, mean and 95 % interval")
        axes.grid(axis="y", visible=False)
        return laid_out(figure)


def _finish(axes: Axes, x: str, y: str, *, from_zero: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(ncols=2, fontsize=8)
