"""The report's figures: hallucination before and after, PPO curves, calibration of the rewards.

Each figure is drawn once and saved twice: as PNG on white, and as SVG whose ink is the colour of
the text around it, so that one figure serves a light and a dark page.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fgaif.eval.policy import MODES, Mode
from fgaif.eval.run_results import PHASES, Phase
from fgaif.eval.spread import Spread, Spreads
from fgaif.eval.uncertainty import Estimate
from fgaif.kinds import words
from fgaif.types import CaptionMetrics, EvalReport, Json, Kind, StepReport

INK = "#20242c"
PHASE_COLOURS: dict[Phase, str] = {"before": "#9aa3b2", "after": "#2a78d6"}
_LINE = "#2a78d6"
STYLE = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.12,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "fgaif",
    "font.family": "sans-serif",
}
FEW = 20
"""Segments of a bin below which its share is little more than chance."""
_ERRORS = {"any": "any kind", "chair_s": "CHAIR$_s$", "chair_i": "CHAIR$_i$"}
"""Bars after those of the kinds."""
_OF_KINDS = {"reward per response": "reward", "hallucinated share of segments": "hallu"}
"""Panels with a line for each kind, and the group of their metrics."""
_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("KL to the reference per response", {"kl/response": ""}),
    ("tokens per response", {"length/tokens": ""}),
    ("clipped share of tokens", {"policy/clip_frac": ""}),
    ("explained variance of the values", {"value/explained_variance": ""}),
    ("|probability difference| to the engine", {"mismatch/mean": ""}),
    ("share of the update in the engines", {"sync/arrived": ""}),
    ("seconds per step", {"seconds/total": ""}),
)
_SIGNED = {"reward", "kl/response", "value/explained_variance", "sync/arrived"}
"""Metrics, or groups of them, whose axis need not start at zero."""


def errors_figure(
    evals: Mapping[Phase, EvalReport],
    judge: str = "",
    spreads: Mapping[Mode, Spreads] | None = None,
    *,
    narrow: bool = False,
) -> Figure | None:
    """Bars of every hallucination figure, sampled and greedy; None without an evaluation.

    The judge is named above, and intervals are drawn where they are known. ``narrow`` puts the
    panels under each other, for a page as wide as a telephone.
    """
    if not evals:
        return None
    kinds = list(next(iter(evals.values())).sampled.kinds)
    names = [*map(words, kinds), *_ERRORS.values()]
    with mpl.rc_context(STYLE):
        size, (rows, columns) = ((4.6, 5.6), (2, 1)) if narrow else ((10, 3.2), (1, 2))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, sharey=True)
        if judge:
            said = f"hallucinated share of captions,\njudged by {judge}"
            figure.suptitle(said if narrow else said.replace("\n", " "), fontsize=10)
        for axes, mode in zip(panels, MODES[::-1], strict=True):
            axes.set_title(f"{mode} captions")
            for place, phase in enumerate(phase for phase in PHASES if phase in evals):
                found = (spreads or {}).get(mode, {})
                _bars(axes, place, phase, getattr(evals[phase], mode), found)
            turned = 30 if narrow and len(names) > 4 else 0
            axes.set_xticks([i + 0.2 for i in range(len(names))], names, rotation=turned)
            axes.tick_params(axis="x", length=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.legend(loc="upper left", ncols=2)
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(low, min(high * 1.2, 1) or 1)
        return laid_out(figure)


def _bars(axes: Axes, place: int, phase: Phase, metrics: CaptionMetrics, spreads: Spreads) -> None:
    names = [*metrics.kinds, *_ERRORS]
    values = [*metrics.kinds.values(), *(getattr(metrics, name) for name in _ERRORS)]
    known = [(i + 0.4 * place, value) for i, value in enumerate(values) if value is not None]
    reach = []
    for name, value in zip(names, values, strict=True):
        ends: Estimate = getattr(spreads.get(name, Spread()), phase)
        if value is not None:
            inside = ends.low is not None and ends.high is not None
            reach.append((value - ends.low, ends.high - value) if inside else (0.0, 0.0))
    bars = axes.bar(
        [x for x, _ in known],
        [value for _, value in known],
        width=0.37,
        color=PHASE_COLOURS[phase],
        label=phase,
    )
    if any(map(any, reach)):
        lower, upper = zip(*reach, strict=True)
        heights = [value for _, value in known]
        axes.errorbar(
            [x for x, _ in known], heights, yerr=(lower, upper), fmt="none", ecolor=INK,
            elinewidth=0.9, capsize=2,
        )  # fmt: skip
    labels = [
        f"{100 * value:.0f}" if value >= 0.0995 else f"{100 * value:.1f}" for _, value in known
    ]
    axes.bar_label(bars, labels, padding=1.5, fontsize=7.5, color=INK)


def curves_figure(
    steps: Sequence[StepReport], colours: Mapping[Kind, str], *, narrow: bool = False
) -> Figure | None:
    """One small panel per metric of the PPO loop; None without steps or known metrics.

    ``colours`` are those of the kinds, in order.
    """
    known = {name for step in steps for name in step.metrics}
    by_kind = [
        (title, {f"{group}/{kind}": kind for kind in colours}) for title, group in _OF_KINDS.items()
    ]
    panels = [(title, lines) for title, lines in (*by_kind, *_PANELS) if known & set(lines)]
    if not panels:
        return None
    columns, width = (1, 4.6) if narrow else (4, 12)
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, (1.9 if narrow else 2.3) * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (title, lines) in zip(grid, panels, strict=False):
            axes.set_title(title, fontsize=9)
            for name, label in lines.items():
                points = [(s.step, s.metrics[name]) for s in steps if name in s.metrics]
                axes.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    color=colours.get(label, _LINE),
                    label=words(label) or None,
                    linewidth=1.6,
                    marker="o" if len(points) < 3 else None,
                    markersize=3,
                )
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            if not {*lines, *(name.partition("/")[0] for name in lines)} & _SIGNED:
                axes.set_ylim(bottom=0)
            if len(lines) > 1:
                axes.legend()
        for axes in list(figure.axes)[len(panels) :]:
            axes.remove()
        figure.supxlabel("PPO step", fontsize=9)
        return laid_out(figure)


def calibration_figure(
    rewards: Mapping[str, Json], colours: Mapping[Kind, str], *, narrow: bool = False
) -> Figure | None:
    """Reliability of each reward model; None if no card has ``calibration``.

    ``colours`` are those of the kinds, in order.

    A card's ``calibration`` is a list of bins, each ``{"confidence", "accuracy", "count"}``. Bins
    of few segments say little: they are rings, and no line leads to them.
    """
    cards = {kind: rewards[kind]["calibration"] for kind in colours if _has_bins(rewards, kind)}
    if not cards:
        return None
    with mpl.rc_context(STYLE):
        count = len(cards)
        size, (rows, columns) = (
            ((4.6, 3.0 * count), (count, 1)) if narrow else ((3.2 * count, 3.1), (1, count))
        )
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axes, (kind, bins) in zip(panels, cards.items(), strict=True):
            _calibration(axes, bins, colours[kind])
            axes.set_title(words(kind))
            axes.set_xlabel("confidence of the model")
        panels[0].set_ylabel("share that is right")
        return laid_out(figure)


def _calibration(axes: Axes, bins: Sequence[Json], colour: str) -> None:
    filled = [row for row in bins if row["count"]]
    total = sum(row["count"] for row in filled)
    many = [row for row in filled if row["count"] >= FEW]
    axes.plot([0, 1], [0, 1], color=INK, alpha=0.35, linewidth=1, linestyle="--", label="honest")
    axes.plot(
        [row["confidence"] for row in many],
        [row["accuracy"] for row in many],
        color=colour,
        linewidth=1.2,
    )
    for rows, label in ((many, "segments"), ([r for r in filled if r not in many], f"under {FEW}")):
        if rows:
            axes.scatter(
                [row["confidence"] for row in rows],
                [row["accuracy"] for row in rows],
                s=[14 + 180 * row["count"] / total for row in rows],
                color=colour if rows is many else "none",
                edgecolors=colour,
                alpha=0.75,
                label=label,
                clip_on=False,
            )
    axes.set_xlim(0.3, 1)
    axes.set_ylim(0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend = axes.legend(loc="lower right")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([30])  # type: ignore[union-attr]


def laid_out(figure: Figure) -> Figure:
    """Lay out once: each save would do it again, which is half of the time of drawing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _has_bins(rewards: Mapping[str, Json], kind: str) -> bool:
    return any(row["count"] for row in rewards.get(kind, {}).get("calibration") or [])


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG on a white ground."""
    figure.savefig(path, dpi=150, facecolor="white")


def to_svg(figure: Figure, name: str = "") -> str:
    """Return a figure as an ``<svg>`` element without a ground; its ink is ``currentColor``.

    ``name`` keeps its ids apart from those of other figures of the page.
    """
    stream = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": f"fgaif {name}"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img" class="figure"', svg, count=1)
