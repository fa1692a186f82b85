"""A scored benchmark: additive statistics per item, from which every figure and interval comes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fgaif.types import Json

Stats = NDArray[np.float64]
FigureFunction = Callable[[Stats], Mapping[str, Stats]]
"""From sums (..., D) of the columns to figures (...) by name; NaN without a denominator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One model on one benchmark.

    ``stats`` (N, D) holds per item what is summed; ``figures`` makes the benchmark's numbers from
    the sums, for one sum (D,) and for many (R, D): so resampling items is one matrix product.
    ``groups`` are the names, in order of the columns, that ``figures`` was made for (splits, types,
    categories): from them and the benchmark's name saved results get their figures again.
    ``units`` (N,) names what is resampled together, as a rule the image. ``items`` (N,) say for
    people what was asked and answered (``id``, ``image``, ``question``, ``answer``, ...), and
    ``badness`` (N,) which of them went worst. ``counts`` are what was left out, by reason;
    ``provenance`` is what the score depends on besides the answers (judge, prompt digest, files).
    ``warnings`` are sentences that make the figures doubtful; they stand wherever the figures do.
    """

    benchmark: str
    ids: tuple[str, ...]
    units: tuple[str, ...]
    stats: Stats
    figures: FigureFunction
    groups: tuple[str, ...] = ()
    items: tuple[Json, ...] = ()
    badness: Stats | None = None
    counts: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """The benchmark's figures over all items."""
        return {name: float(v) for name, v in self.figures(self.stats.sum(axis=0)).items()}


def ratio(numerator: Stats, denominator: Stats) -> Stats:
    """Divide sums elementwise; NaN where the denominator is 0."""
    empty = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    return np.divide(numerator, denominator, out=empty, where=denominator != 0)
