"""How best-of-k pays: figures of the response that scores choose among k of n samples.

From n samples of a prompt the mean over all their subsets of size k is computed, not one draw:

    E_k[m] = sum_i m_(i) C(i - 1, k - 1) / C(n, k)

with m_(i) the figure of the sample whose score is the i-th smallest: the best of a subset is the
i-th smallest where the other k - 1 are among the i - 1 below it. Choosing so moves the policy by a
KL of at most log k - (k - 1) / k (Beirami et al., arXiv 2401.01879).
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fgaif.errors import ConfigError
from fgaif.eval.plots import STYLE
from fgaif.types import Json

KS = (1, 2, 4, 8, 16)
_RESAMPLES = 1000


def curve_ks(n: int) -> tuple[int, ...]:
    """The numbers of samples on the curve: 1, 2, 4, 8, 16 as far as ``n``, and ``n`` itself."""
    return tuple(sorted({k for k in KS if k <= n} | {n}))


def best_of_weights(scores: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Probability of each sample to be the best of k drawn ones, (P, n) -> (P, n).

    Among equal scores the earlier sample wins, as in the choice itself.

    Raises:
        ConfigError: k is not between 1 and n.
    """
    count = scores.shape[1]
    if not 1 <= k <= count:
        raise ConfigError(f"best of {k}: there are {count} samples of each prompt")
    by_rank = np.array([math.comb(rank, k - 1) for rank in range(count)]) / math.comb(count, k)
    # Ascending; reversed first, so that of equal ones the earlier is the larger.
    order = count - 1 - np.argsort(scores[:, ::-1], axis=1, kind="stable")
    weights = np.empty(scores.shape)
    np.put_along_axis(weights, order, np.broadcast_to(by_rank, scores.shape), axis=1)
    return weights


def best_of_curve(
    scores: NDArray[np.float64],
    counts: Mapping[str, NDArray[np.float64]],
    *,
    seed: int = 0,
) -> list[Json]:
    """Figures of best-of-k for each k of :func:`curve_ks`, with 95 % bootstrap intervals.

    Args:
        scores: (P, n) of the samples of P prompts.
        counts: by figure, numerator and denominator of each sample (P, n, 2); a figure is the sum
            of the first over that of the second. None of it where the second is zero.
        seed: of the resampling of prompts.
    """
    drawn = np.random.default_rng(seed).integers(len(scores), size=(_RESAMPLES, len(scores)))
    rows: list[Json] = []
    for k in curve_ks(scores.shape[1]):
        weights = best_of_weights(scores, k)[..., None]
        row: Json = {"k": k, "kl_bound": math.log(k) - (k - 1) / k}
        for name, both in counts.items():
            sums = (weights * both).sum(axis=1)  # (P, 2)
            row[name] = _ratio(sums.sum(axis=0))
            resampled = sums[drawn].sum(axis=1)
            known = resampled[resampled[:, 1] > 0]
            if row[name] is not None and len(known):
                low, high = np.quantile(known[:, 0] / known[:, 1], (0.025, 0.975))
                row[f"{name}_interval"] = [float(low), float(high)]
        rows.append(row)
    return rows


def _ratio(sums: NDArray[np.float64]) -> float | None:
    return float(sums[0] / sums[1]) if sums[1] > 0 else None


def best_of_figure(rows: Sequence[Json], titles: Mapping[str, str]) -> Figure:
    """A panel per figure over k, with its intervals."""
    shown = {name: title for name, title in titles.items() if rows[0].get(name) is not None}
    ks = [row["k"] for row in rows]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.0 * len(shown), 2.6), layout="constrained")
        for place, (name, title) in enumerate(shown.items(), start=1):
            axes = figure.add_subplot(1, len(shown), place)
            values = [row[name] for row in rows]
            bounds = [row.get(f"{name}_interval", [row[name]] * 2) for row in rows]
            axes.plot(ks, values, marker="o", color="#2a78d6")
            axes.fill_between(
                ks, [low for low, _ in bounds], [high for _, high in bounds], alpha=0.15
            )
            axes.set_xscale("log", base=2)
            axes.set_xticks(ks, [str(k) for k in ks])
            axes.set_xlabel("samples k")
            axes.set_title(title)
    return figure
