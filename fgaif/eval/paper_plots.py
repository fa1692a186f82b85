"""Plots of scored benchmarks for a paper, one colour per model: bars with intervals, errors always
beside what was said, precision against recall, and errors by place and by length.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fgaif.eval.benchmarks import load_benchmark
from fgaif.eval.buckets import segment_count
from fgaif.eval.figures import Figure as Declared
from fgaif.eval.figures import find_figure, title_of
from fgaif.eval.plots import STYLE, laid_out
from fgaif.eval.scored import Scored, Stats, ratio
from fgaif.eval.uncertainty import Estimate, intervals
from fgaif.types import Json

COLOURS = ("#2a78d6", "#d6762a", "#4a9d5b", "#a2559b", "#8a8f99", "#b8a02e")
PLACES = 5
COUNTS = ((1, 3), (4, 6), (7, 9), (10, 12), (13, 999))
"""Bins of sub-sentences per answer, both ends included."""
Models = Mapping[str, Scored]
"""Results of one benchmark by the model's name."""


def draw_all(models: Models, seed: int = 0) -> dict[str, Figure]:
    """Every plot that the benchmark has something for, by its file name without ending."""
    estimates = {name: intervals(scored, seed=seed) for name, scored in models.items()}
    benchmark = next(iter(models.values())).benchmark
    made = {
        "errors": errors_and_coverage(benchmark, estimates),
        "groups": bars_by_group(benchmark, estimates),
        "precision_recall": precision_against_recall(benchmark, estimates),
        "place": errors_by(models, "place", seed),
        "count": errors_by(models, "count", seed),
    }
    return {f"{benchmark}_{name}": figure for name, figure in made.items() if figure is not None}


def save_all(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as PDF, which papers take, and as PNG; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for ending, more in (("pdf", {"metadata": {"CreationDate": None}}), ("png", {"dpi": 200})):
            paths.append(folder / f"{name}.{ending}")
            figure.savefig(paths[-1], facecolor="white", **more)
    return paths


def errors_and_coverage(
    benchmark: str, estimates: Mapping[str, Mapping[str, Estimate]]
) -> Figure | None:
    """Bars of the figures of errors, and beside them those that say how much was said."""
    coverage = load_benchmark(benchmark).coverage
    if not any(found[name].value is not None for name in coverage for found in estimates.values()):
        return None
    beside = list(dict.fromkeys(name for names in coverage.values() for name in names))
    shares = [name for name in beside if _figure(benchmark, name).share]
    amounts = [name for name in beside if not _figure(benchmark, name).share]
    panels = [panel for panel in (list(coverage), shares, amounts[:1], amounts[1:]) if panel]
    with mpl.rc_context(STYLE):
        widths = [max(1.6, 0.9 * len(panel)) for panel in panels]
        figure = Figure(figsize=(1.2 * sum(widths) + 1, 2.8), layout="constrained")
        grid = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
        for axes, names in zip(grid, panels, strict=True):
            _bars(axes, benchmark, names, estimates)
        titles = ["errors", *["what is said"] * (len(panels) - 1)]
        for axes, title in zip(grid, titles, strict=True):
            axes.set_title(title)
        grid[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
        return laid_out(figure)


def bars_by_group(benchmark: str, estimates: Mapping[str, Mapping[str, Estimate]]) -> Figure | None:
    """Bars of one figure over the groups that have it (kinds, types, parts); None with fewer than
    two groups."""
    groups = _groups(benchmark, next(iter(estimates.values())))
    if len(groups) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(4.0, 1.1 * len(groups) + 1.5), 2.8), layout="constrained")
        axes = figure.subplots()
        _bars(axes, benchmark, groups, estimates, by_group=True)
        axes.set_title(title_of(_figure(benchmark, groups[0]), groups[0]))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        return laid_out(figure)


def precision_against_recall(
    benchmark: str, estimates: Mapping[str, Mapping[str, Estimate]]
) -> Figure | None:
    """A point with both intervals per model: what is right of what is said, and what is said of
    what is there; None where the benchmark has no such pair."""
    pair = next(
        (
            (error, said)
            for error, names in load_benchmark(benchmark).coverage.items()
            for said in names
            if _figure(benchmark, error).share and _figure(benchmark, said).share
        ),
        None,
    )
    if pair is None:
        return None
    error, said = pair
    if all(None in (found[error].value, found[said].value) for found in estimates.values()):
        return None
    lower = _figure(benchmark, error).better < 0
    with mpl.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure = Figure(figsize=(4.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for colour, (name, found) in zip(_colours(estimates), estimates.items(), strict=True):
            x, y = found[said], found[error]
            if x.value is None or y.value is None:
                continue
            height = 1 - y.value if lower else y.value
            up, down = _reach(y)[::-1] if lower else _reach(y)
            axes.errorbar(
                [x.value], [height], xerr=np.array([_reach(x)]).T, yerr=[[up], [down]],
                fmt="o", color=colour, capsize=2, label=name,
            )  # fmt: skip
        title = title_of(_figure(benchmark, error), error)
        axes.set_xlabel(title_of(_figure(benchmark, said), said))
        axes.set_ylabel(f"1 − {title}" if lower else title)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend()
        return laid_out(figure)


def errors_by(models: Models, what: str, seed: int = 0) -> Figure | None:
    """Share of what is said that is wrong, by its ``place`` in the answer (fifths of the order in
    which things are said) or by the ``count`` of sub-sentences; None where answers keep no order.

    The lower panel has how much is said there, so that errors stand beside coverage.
    """
    curves = {name: curve(scored, what, seed) for name, scored in models.items()}
    if not any(found["said"].any() for found in curves.values()):
        return None
    labels = [f"{20 * p}–{20 * (p + 1)} %" for p in range(PLACES)]
    if what == "count":
        labels = [f"{low}–{high}" if high < COUNTS[-1][1] else f"{low}+" for low, high in COUNTS]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.8), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        for colour, (name, found) in zip(_colours(curves), curves.items(), strict=True):
            x = np.flatnonzero(found["said"] > 0)
            wrong = found["wrong"][x]
            yerr = np.array([wrong - found["low"][x], found["high"][x] - wrong]).clip(0)
            top.errorbar(x, wrong, yerr=yerr, color=colour, marker="o", markersize=3.5, capsize=2)
            bottom.plot(x, found["per_answer"][x], color=colour, marker="o", markersize=3.5)
            top.plot([], [], color=colour, label=name)
        top.set_title("wrong share of what is said")
        top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        top.set_ylim(bottom=0)
        top.legend()
        bottom.set_title("things said per answer")
        bottom.set_ylim(bottom=0)
        bottom.set_xticks(range(len(labels)), labels)
        bottom.set_xlabel(
            "place in the answer" if what == "place" else "sub-sentences of the answer"
        )
        return laid_out(figure)


def curve(scored: Scored, what: str, seed: int = 0, resamples: int = 1000) -> dict[str, Stats]:
    """Per bin: ``said`` (things), ``wrong`` (share), ``low`` and ``high`` (95 %, resampled units),
    ``per_answer`` (things per answer that falls into the bin)."""
    bins = PLACES if what == "place" else len(COUNTS)
    rows = np.zeros((len(scored.items), 3, bins))
    for row, item in zip(rows, scored.items, strict=True):
        flags = said_in_order(item)
        for index, wrong in enumerate(flags):
            middle = (index + 0.5) / len(flags)
            place = int(middle * PLACES) if what == "place" else _count_bin(item["answer"])
            row[0, place] += 1
            row[1, place] += wrong
        if flags:
            row[2, :] = row[0] > 0 if what == "count" else 1
    units = list(dict.fromkeys(scored.units))
    place_of = {unit: number for number, unit in enumerate(units)}
    sums = np.zeros((len(units), 3, bins))
    np.add.at(sums, [place_of[unit] for unit in scored.units], rows)
    picks = np.random.default_rng(seed).integers(len(units), size=(resamples, len(units)))
    drawn = sums[picks].sum(axis=1)
    said, wrong, answers = sums.sum(axis=0)
    shares = ratio(drawn[:, 1], drawn[:, 0])
    low, high = np.array([_ends(column[~np.isnan(column)]) for column in shares.T]).T
    return {
        "said": said,
        "wrong": ratio(wrong, said),
        "low": low,
        "high": high,
        "per_answer": ratio(said, answers),
    }


def _ends(drawn: Stats) -> list[float]:
    return np.percentile(drawn, [2.5, 97.5]).tolist() if len(drawn) else [np.nan, np.nan]


def said_in_order(item: Json) -> list[bool]:
    """Whether each thing that an answer says is wrong, in the order in which it says them.

    Things are the objects named, else the facts, else the descriptive sub-sentences; those of no
    known truth are left out.
    """
    if "named" in item:
        wrong = set(item.get("hallucinated", ()))
        return [name in wrong for name in item["named"]]
    if isinstance(item.get("facts"), dict):
        return [not right for right in item["facts"].values() if right is not None]
    return [
        not piece["faithful"]
        for piece in item.get("descriptive", ())
        if piece["faithful"] is not None
    ]


def _count_bin(text: str) -> int:
    count = max(1, segment_count(text))
    return next(number for number, (low, high) in enumerate(COUNTS) if low <= count <= high)


def _groups(benchmark: str, found: Mapping[str, Estimate]) -> list[str]:
    """Figures of one key that several groups have, the first such key; else those of the kinds."""
    plain = [name for name in found if not name.startswith("segments_")]
    by_key: dict[str, list[str]] = {}
    for name in plain:
        group, _, key = name.rpartition("/")
        if group and not group.endswith(("generative", "discriminative")):
            by_key.setdefault(key, []).append(name)
    wanted = next((key for key in ("hallucination_rate", "f1", *by_key) if key in by_key), None)
    if wanted is not None:
        return by_key[wanted]
    known = {figure.key for figure in load_benchmark(benchmark).figures}
    return [name for name in plain if name not in known and "official" not in name]


def _bars(
    axes: Axes,
    benchmark: str,
    names: Sequence[str],
    estimates: Mapping[str, Mapping[str, Estimate]],
    *,
    by_group: bool = False,
) -> None:
    width = 0.8 / len(estimates)
    for number, (colour, (model, found)) in enumerate(
        zip(_colours(estimates), estimates.items(), strict=True)
    ):
        known = [(i, found[name]) for i, name in enumerate(names) if found[name].value is not None]
        axes.bar(
            [i + number * width for i, _ in known],
            [e.value or 0.0 for _, e in known],
            width=0.92 * width,
            yerr=np.array([_reach(e) for _, e in known]).T if known else None,
            error_kw={"elinewidth": 0.9, "capsize": 2},
            color=colour,
            label=model,
        )
    texts = [
        name.rpartition("/")[0].rpartition("/")[2] or name
        if by_group
        else title_of(_figure(benchmark, name), name)
        for name in names
    ]
    turned = 25 if sum(map(len, texts)) > 10 * len(names) else 0
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], texts, rotation=turned)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(bottom=0)
    if all(_figure(benchmark, name).share for name in names):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _figure(benchmark: str, name: str) -> Declared:
    return find_figure(load_benchmark(benchmark).figures, name)


def _reach(estimate: Estimate) -> tuple[float, float]:
    """How far the interval reaches down and up; 0 where it is not known."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return 0.0, 0.0
    return max(0.0, estimate.value - estimate.low), max(0.0, estimate.high - estimate.value)


def _colours(names: Mapping[str, object]) -> Iterator[str]:
    for number, _ in enumerate(names):
        yield COLOURS[number % len(COLOURS)]
