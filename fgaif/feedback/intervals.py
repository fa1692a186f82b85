"""How sure shares and agreements are: Wilson's interval, weighted shares, Cohen's kappa."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

from fgaif.types import Answer

T = TypeVar("T")

Z = NormalDist().inv_cdf(0.975)
"""Of a 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure, the ends of its 95 % interval, and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int


def wilson(share: float, n: float) -> tuple[float, float]:
    """Interval of a share p of n observations (Wilson, 1927): within [0, 1], also for p of 0 or 1.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    centre = share + Z**2 / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def weighted_share(observations: Sequence[tuple[bool, float]]) -> Estimate | None:
    """Share of the weight w that is true, as (true, w) pairs; None without observations.

    Wilson's interval for the effective number (sum w)^2 / sum w^2 (Kish, 1965), which is the
    number of observations where all weights are equal.
    """
    if not observations:
        return None
    total = math.fsum(weight for _, weight in observations)
    share = math.fsum(weight for true, weight in observations if true) / total
    effective = total**2 / math.fsum(weight**2 for _, weight in observations)
    low, high = wilson(share, effective)
    return Estimate(value=share, low=low, high=high, n=len(observations))


def cohen_kappa(pairs: Sequence[tuple[Answer, Answer]]) -> Estimate | None:
    """Agreement of two judges beyond chance, of (first, second) answers, yes or no.

    kappa = (p_o - p_e) / (1 - p_e); the variance is that of Fleiss, Cohen and Everitt (1969).
    None where it has no value: no pair, or both always gave the same one answer (p_e = 1).
    """
    n = len(pairs)
    if not n:
        return None
    answers: tuple[Answer, ...] = ("yes", "no")
    cell = {(a, b): pairs.count((a, b)) / n for a in answers for b in answers}
    first = {a: sum(cell[a, b] for b in answers) for a in answers}
    second = {b: sum(cell[a, b] for a in answers) for b in answers}
    observed = sum(cell[a, a] for a in answers)
    chance = sum(first[a] * second[a] for a in answers)
    if chance == 1:
        return None
    kappa = (observed - chance) / (1 - chance)
    agreeing = sum(cell[a, a] * (1 - (first[a] + second[a]) * (1 - kappa)) ** 2 for a in answers)
    apart = sum(p * (second[a] + first[b]) ** 2 for (a, b), p in cell.items() if a != b)
    variance = agreeing + (1 - kappa) ** 2 * apart - (kappa - chance * (1 - kappa)) ** 2
    half = Z * math.sqrt(max(0.0, variance) / n) / (1 - chance)
    return Estimate(value=kappa, low=max(-1.0, kappa - half), high=min(1.0, kappa + half), n=n)
