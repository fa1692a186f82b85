"""The run's figures before and after training: names, meanings, and the change for people."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from fgaif.eval.benchmarks.chair import FIGURES as CHAIR
from fgaif.eval.benchmarks.pope import FIGURES as POPE_FIGURES
from fgaif.eval.figures import ChangeVerdict, Figure, find_figure
from fgaif.types import CaptionMetrics, PopeMetrics

_OF_KIND = "Hallucinated share of the segments that state a fact of this kind"
CAPTIONS = (
    Figure(key="object", title="object errors", meaning=_OF_KIND, better=-1),
    Figure(key="attribute", title="attribute errors", meaning=_OF_KIND, better=-1),
    Figure(key="relation", title="relation errors", meaning=_OF_KIND, better=-1),
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
)
POPE = tuple(find_figure(POPE_FIGURES, field.name) for field in fields(PopeMetrics))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure before and after, ready to print."""

    figure: Figure
    before: str
    after: str
    change: str
    verdict: ChangeVerdict


def compare(
    before: CaptionMetrics | PopeMetrics | None, after: CaptionMetrics | PopeMetrics | None
) -> Iterator[Change]:
    """Yield the figures of two evaluations side by side; either may be missing."""
    some = before or after
    for figure in () if some is None else POPE if isinstance(some, PopeMetrics) else CAPTIONS:
        old = getattr(before, figure.key, None)
        new = getattr(after, figure.key, None)
        yield Change(
            figure=figure,
            before=figure.show(old),
            after=figure.show(new),
            change=figure.change(old, new),
            verdict=figure.verdict(old, new),
        )
