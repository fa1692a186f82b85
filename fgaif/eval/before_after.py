"""The run's figures before and after training: names, meanings, and the change for people."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from fgaif.eval.benchmarks.chair import FIGURES as CHAIR
from fgaif.eval.benchmarks.pope import FIGURES as POPE_FIGURES
from fgaif.eval.figures import NOT_KNOWN, ChangeVerdict, Figure, find_figure
from fgaif.eval.spread import Spread
from fgaif.kinds import words
from fgaif.types import CaptionMetrics, Kind, PopeMetrics

CAPTIONS = (
    Figure(
        key="any",
        title="any error",
        meaning="Share of the segments with facts that hold a hallucination of some kind",
        better=-1,
    ),
    find_figure(CHAIR, "chair_s"),
    find_figure(CHAIR, "chair_i"),
    replace(find_figure(CHAIR, "recall"), title="object recall"),
    Figure(
        key="true_facts",
        title="true facts",
        meaning="Distinct true facts per caption",
        better=1,
        share=False,
    ),
    Figure(
        key="length",
        title="length",
        meaning="Tokens per caption; should stay about where it was",
        better=0,
        share=False,
    ),
    Figure(
        key="repetition",
        title="repetition",
        meaning="Segments that repeat an earlier one of their caption",
        better=-1,
    ),
    Figure(
        key="malformed",
        title="malformed",
        meaning="Segments that are not English of this world; an empty caption counts as one",
        better=-1,
    ),
    Figure(
        key="specificity",
        title="attributes per object",
        meaning="Distinct attribute facts per distinct object fact: a policy that hedges says less",
        better=0,
        share=False,
    ),
)
"""Figures of captions, after those of the kinds."""
POPE = tuple(find_figure(POPE_FIGURES, field.name) for field in fields(PopeMetrics))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure before and after, ready to print; the ``ranges`` are 95 % intervals, or empty."""

    figure: Figure
    before: str
    after: str
    change: str
    verdict: ChangeVerdict
    ranges: tuple[str, str, str] = ("", "", "")

    @property
    def known(self) -> bool:
        """Whether there is a value on either side."""
        return {self.before, self.after} != {NOT_KNOWN}


def compare(
    before: CaptionMetrics | PopeMetrics | None,
    after: CaptionMetrics | PopeMetrics | None,
    *,
    spreads: Mapping[str, Spread] | None = None,
) -> Iterator[Change]:
    """Yield the figures of two evaluations side by side; either may be missing."""
    for figure in _figures_of(before or after):
        old, new = (_value(side, figure) for side in (before, after))
        spread = (spreads or {}).get(figure.key, Spread())
        change = spread.change
        yield Change(
            figure=figure,
            before=figure.show(old),
            after=figure.show(new),
            change=figure.change(old, new),
            verdict=figure.verdict(change.low, change.high),
            ranges=(
                figure.show_range(spread.before.low, spread.before.high),
                figure.show_range(spread.after.low, spread.after.high),
                figure.show_range(change.low, change.high, "+"),
            ),
        )


def errors_of(kind: Kind) -> Figure:
    """How the hallucinations of a kind are shown."""
    return Figure(
        key=kind,
        title=f"{words(kind)} errors",
        meaning="Hallucinated share of the segments that state a fact of this kind",
        better=-1,
    )


def _figures_of(metrics: CaptionMetrics | PopeMetrics | None) -> tuple[Figure, ...]:
    if metrics is None:
        return ()
    if isinstance(metrics, PopeMetrics):
        return POPE
    return (*map(errors_of, metrics.kinds), *CAPTIONS)


def _value(metrics: CaptionMetrics | PopeMetrics | None, figure: Figure) -> float | None:
    if isinstance(metrics, CaptionMetrics) and figure.key in metrics.kinds:
        return metrics.kinds[figure.key]
    return getattr(metrics, figure.key, None)
