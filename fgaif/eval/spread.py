"""Intervals of a run's figures before and after training: bootstrap over images, paired.

The captions file of an evaluation keeps what each caption adds to every figure, the POPE file each
answer, so that intervals can be made at any time without judging anything again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fgaif.errors import DataError
from fgaif.eval.benchmarks.pope import PopeFigures, answer_stats
from fgaif.eval.scored import Scored, Stats, ratio
from fgaif.eval.uncertainty import Estimate, compare, intervals
from fgaif.types import Json

_UNKNOWN = Estimate(value=None, low=None, high=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure before and after with 95 % intervals, and the change, whose interval is paired."""

    before: Estimate = _UNKNOWN
    after: Estimate = _UNKNOWN
    change: Estimate = _UNKNOWN


Spreads = dict[str, Spread]
"""By the figure's name."""


@dataclass(frozen=True, slots=True)
class CaptionFigures:
    """From sums (..., 2F) of numerators, then denominators, to the F figures of captions."""

    names: tuple[str, ...]

    def __call__(self, sums: Stats) -> dict[str, Stats]:
        """The figures by name; NaN without a denominator."""
        values = ratio(sums[..., : len(self.names)], sums[..., len(self.names) :])
        return {name: values[..., index] for index, name in enumerate(self.names)}


def caption_spreads(before: Sequence[Json], after: Sequence[Json]) -> Spreads:
    """Intervals of the figures of captions, from rows with ``id``, ``sha256`` and ``counts``.

    Rows of versions that kept no counts have none.
    """
    names = tuple(dict.fromkeys(name for row in (*before, *after) for name in row["counts"]))
    return spreads(*(_captions(rows, names) for rows in (before, after)))


def pope_spreads(before: Sequence[Json], after: Sequence[Json]) -> dict[str, Spreads]:
    """Intervals of POPE's figures by strategy, ``mean`` first, from rows of answers."""
    splits = tuple(dict.fromkeys(row["strategy"] for row in (*before, *after)))
    if not splits:
        return {}
    found = spreads(*(_pope(rows, splits) for rows in (before, after)))
    parts: dict[str, Spreads] = {}
    for name, spread in found.items():
        group, _, figure = name.rpartition("/")
        parts.setdefault(group or "mean", {})[figure] = spread
    return parts


def spreads(before: Scored | None, after: Scored | None) -> Spreads:
    """Intervals of two evaluations; of one alone where the other is missing.

    Without an item in common there is none of the change.
    """
    sides = [intervals(side) if side is not None else {} for side in (before, after)]
    changes: Mapping[str, Estimate] = {}
    if before is not None and after is not None and set(before.ids) & set(after.ids):
        found = compare(before, after, permutations=1)  # its interval, not its p-value
        changes = {name: figure.difference for name, figure in found.figures.items()}
    return {
        name: Spread(
            before=sides[0].get(name, _UNKNOWN),
            after=sides[1].get(name, _UNKNOWN),
            change=changes.get(name, _UNKNOWN),
        )
        for name in {**sides[0], **sides[1]}
    }


def _captions(rows: Sequence[Json], names: tuple[str, ...]) -> Scored | None:
    if not rows or not names:
        return None
    stats = [[row["counts"].get(name, (0, 0)) for name in names] for row in rows]
    columns = np.array(stats, np.float64).transpose(0, 2, 1).reshape(len(rows), -1)
    return _scored("captions", rows, [row["id"] for row in rows], columns, CaptionFigures(names))


def _pope(rows: Sequence[Json], splits: tuple[str, ...]) -> Scored | None:
    if not rows:
        return None
    stats = np.zeros((len(rows), len(splits), len(answer_stats(True, True, True))))
    for index, row in enumerate(rows):
        place = splits.index(row["strategy"])
        stats[index, place] = answer_stats(row["yes"], row["yes"], row["label"])
    ids = [f"{row['strategy']}/{row['sha256']}/{row['question']}" for row in rows]
    return _scored("pope", rows, ids, stats.reshape(len(rows), -1), PopeFigures(splits))


def _scored(
    name: str,
    rows: Sequence[Json],
    ids: Iterable[str],
    stats: Stats,
    figures: CaptionFigures | PopeFigures,
) -> Scored:
    if not np.isfinite(stats).all():
        raise DataError(f"{name}: counts are no numbers; run `fgaif eval run` again")
    return Scored(
        benchmark=name,
        ids=tuple(ids),
        units=tuple(row["sha256"] for row in rows),
        stats=stats,
        figures=figures,
    )
