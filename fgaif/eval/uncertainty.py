"""How sure a benchmark's figures are: bootstrap intervals, and paired tests of two models.

What is resampled is a *unit* (as a rule an image with all its questions), because answers about one
image err together; questions alone would give intervals that are too narrow. All figures come from
sums of per-item statistics, so a resample is a weighted sum of the units.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fgaif.errors import DataError
from fgaif.eval.scored import FigureFunction, Scored, Stats

RESAMPLES = 2000
PERMUTATIONS = 10_000
LEVEL = 0.95
_OWN = ("model", "answers", "adapter", "converted")
_CELLS = 2**21
"""Numbers per block of resamples, which bounds memory: about 16 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with the ends of its interval; None without a denominator or with one unit only."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A figure of two models on the same items: ``b - a`` in ``difference``, with its interval.

    ``p`` is the two-sided p-value of the paired permutation test, ``p_holm`` the same corrected for
    all figures of the benchmark (Holm, 1979), those that are always equal counted once.
    """

    a: float | None
    b: float | None
    difference: Estimate
    p: float | None
    p_holm: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models on the items that both answered. ``warnings`` say what else differs."""

    benchmark: str
    common: int
    only_a: int
    only_b: int
    figures: dict[str, Difference]
    warnings: tuple[str, ...] = ()


def unit_sums(units: Sequence[str], stats: Stats) -> Stats:
    """Add up items (N, D) by unit: (U, D), units in the order of their first item."""
    place = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    sums = np.zeros((len(place), stats.shape[1]))
    np.add.at(sums, [place[unit] for unit in units], stats)
    return sums


def intervals(scored: Scored, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate]:
    """Figures with 95 % percentile intervals of a cluster bootstrap over the units.

    Each resample draws U of the U units with replacement. Resamples in which a figure has no
    denominator do not count for it.
    """
    values = scored.metrics()
    sums = unit_sums(scored.units, scored.stats)
    drawn = _stacked(
        scored.figures(weights @ sums) for weights in _weights(len(sums), resamples, seed)
    )
    return {name: _estimate(value, drawn[name], len(sums)) for name, value in values.items()}


def compare(
    a: Scored,
    b: Scored,
    *,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Comparison:
    """Compare two models on the items that both have, matched by id.

    The interval of a difference draws the same units for both. The p-value is that of a sign-flip
    test: under the null hypothesis the two models' answers about a unit could be swapped, so all of
    a unit's items change sides together; p is the share of swaps, the observed one among them, with
    a difference at least as large. Up to 13 units all swaps are tried, beyond that ``permutations``
    random ones.

    Raises:
        DataError: other benchmarks, no item in common, or units or columns that do not match.
    """
    mine, theirs, warnings = _matched(a, b)
    sums_a, sums_b = unit_sums(mine.units, mine.stats), unit_sums(theirs.units, theirs.stats)
    values_a, values_b = mine.metrics(), theirs.metrics()
    drawn = _stacked(
        _minus(b.figures(weights @ sums_b), a.figures(weights @ sums_a))
        for weights in _weights(len(sums_a), resamples, seed)
    )
    p_values = _sign_flip(sums_a, sums_b, a.figures, permutations, seed)
    twins = _twins(drawn)
    corrected = holm({name: p_values[name] for name in drawn if twins[name] == name})
    figures = {
        name: Difference(
            a=_known(value),
            b=_known(values_b[name]),
            difference=_estimate(values_b[name] - value, drawn[name], len(sums_a)),
            p=p_values[name],
            p_holm=corrected[twins[name]],
        )
        for name, value in values_a.items()
    }
    return Comparison(
        benchmark=a.benchmark,
        common=len(mine.ids),
        only_a=len(a.ids) - len(mine.ids),
        only_b=len(b.ids) - len(mine.ids),
        figures=figures,
        warnings=warnings,
    )


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Correct p-values for being several: the i-th smallest of m, i from 0, times m - i, at most 1.

    A corrected value is never below that of a smaller p. None stays None and does not count.
    """
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for index, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - index) * p))
        corrected[name] = highest
    return corrected


def _twins(drawn: Mapping[str, NDArray[np.float64]]) -> dict[str, str]:
    """For each figure the first one that equals it in every resample, mostly itself."""
    first: dict[bytes, str] = {}
    return {name: first.setdefault(values.tobytes(), name) for name, values in drawn.items()}


def _matched(a: Scored, b: Scored) -> tuple[Scored, Scored, tuple[str, ...]]:
    if a.benchmark != b.benchmark:
        raise DataError(f"cannot compare {a.benchmark} with {b.benchmark}: give the same benchmark")
    place = {identity: index for index, identity in enumerate(b.ids)}
    pairs = [(i, place[identity]) for i, identity in enumerate(a.ids) if identity in place]
    if not pairs:
        raise DataError(
            f"{a.benchmark}: the two results have no item in common (first ids: "
            f"{a.ids[:1]} and {b.ids[:1]}); score both on the same questions"
        )
    mine, theirs = _take(a, [i for i, _ in pairs]), _take(b, [j for _, j in pairs])
    other = next((i for i, unit in enumerate(mine.units) if theirs.units[i] != unit), None)
    if other is not None:
        raise DataError(
            f"{a.benchmark}: item {mine.ids[other]!r} belongs to {mine.units[other]!r} in one "
            f"result and to {theirs.units[other]!r} in the other; score both on the same questions"
        )
    if a.stats.shape[1] != b.stats.shape[1] or a.metrics().keys() != b.metrics().keys():
        raise DataError(
            f"{a.benchmark}: the two results have other figures (other splits or another version); "
            "score both again in the same way"
        )
    return mine, theirs, tuple(_other_conditions(a, b))


def _other_conditions(a: Scored, b: Scored) -> Iterator[str]:
    """What besides the answers differs, as judges and prompts do; answers and models may."""
    for key in sorted(a.provenance.keys() | b.provenance.keys()):
        mine, theirs = a.provenance.get(key), b.provenance.get(key)
        if mine != theirs and not key.startswith(_OWN):
            yield f"{a.benchmark}: {key} differs: {mine or 'none'} and {theirs or 'none'}"


def _take(scored: Scored, rows: Sequence[int]) -> Scored:
    return replace(
        scored,
        ids=tuple(scored.ids[row] for row in rows),
        units=tuple(scored.units[row] for row in rows),
        stats=scored.stats[list(rows)],
        items=(),
        badness=None,
    )


def _weights(units: int, resamples: int, seed: int) -> Iterator[Stats]:
    """Blocks (R', U) of how often each unit is drawn; R' sum to ``resamples``."""
    rng = np.random.default_rng(seed)
    for rows in _blocks(resamples, units):
        drawn = rng.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * units)
        yield counts.reshape(rows, units).astype(np.float64)


def _sign_flip(
    sums_a: Stats, sums_b: Stats, figures: FigureFunction, permutations: int, seed: int
) -> dict[str, float | None]:
    total_a, total_b, apart = sums_a.sum(axis=0), sums_b.sum(axis=0), sums_b - sums_a
    observed = _minus(figures(total_b), figures(total_a))
    units = len(apart)
    exact = 2**units <= permutations
    drawn = _stacked(
        _minus(figures(total_b - swap @ apart), figures(total_a + swap @ apart))
        for swap in (_all_swaps(units) if exact else _random_swaps(units, permutations, seed))
    )
    return {
        name: _p_value(float(value), drawn[name], exact=exact) for name, value in observed.items()
    }


def _all_swaps(units: int) -> Iterator[Stats]:
    yield (np.arange(2**units)[:, None] >> np.arange(units) & 1).astype(np.float64)


def _random_swaps(units: int, permutations: int, seed: int) -> Iterator[Stats]:
    rng = np.random.default_rng([seed, 1])
    for rows in _blocks(permutations, units):
        yield rng.integers(2, size=(rows, units), dtype=np.int8).astype(np.float64)


def _blocks(total: int, width: int) -> Iterator[int]:
    size = max(1, _CELLS // max(width, 1))
    for start in range(0, total, size):
        yield min(size, total - start)


def _p_value(observed: float, drawn: NDArray[np.float64], *, exact: bool) -> float | None:
    """Share of swaps at least as extreme; a random set has the observed one added."""
    valid = drawn[~np.isnan(drawn)]
    if math.isnan(observed):
        return None
    # Sums in another order differ in their last digits.
    extreme = int((np.abs(valid) >= abs(observed) - 1e-12).sum())
    return extreme / len(valid) if exact else (extreme + 1) / (len(valid) + 1)


def _minus(b: Mapping[str, Stats], a: Mapping[str, Stats]) -> dict[str, Stats]:
    return {name: b[name] - a[name] for name in a}


def _stacked(blocks: Iterator[Mapping[str, Stats]]) -> dict[str, NDArray[np.float64]]:
    parts = list(blocks)
    return {name: np.concatenate([np.atleast_1d(p[name]) for p in parts]) for name in parts[0]}


def _estimate(value: float, drawn: NDArray[np.float64], units: int) -> Estimate:
    valid = drawn[~np.isnan(drawn)]
    if math.isnan(value) or units < 2 or not len(valid):
        return Estimate(value=_known(value), low=None, high=None)
    low, high = np.quantile(valid, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=value, low=float(low), high=float(high))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
