"""Two judges on the same answers: do they agree, who is milder where, and what is a score of the
one worth at the other?

Judges disappear. An old judge's figures stay comparable if a new one has judged the same answers
once: the conversion is a line through the two judges' scores of each answer, with its uncertainty.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fgaif.errors import DataError
from fgaif.eval.scored import Scored, Stats
from fgaif.eval.uncertainty import unit_sums
from fgaif.types import Json

RESAMPLES = 2000
_FEWEST = 5
_CATEGORIES = ("type", "category")
_Z = 1.96


def rejudged(old: Scored, new: Scored, *, seed: int = 0) -> Json:
    """Compare two judges' scores of the same answers.

    Per figure that has a value for single answers: ``old`` and ``new`` (means over the answers),
    ``bias`` (new - old, interval over resampled units), ``equal`` (share of equal scores),
    ``correlation`` (Pearson), ``by_category`` (bias and number of answers) and ``conversion``:
    old = intercept + slope * new, least squares over answers, with the covariance of the two over
    resampled units. Without a spread in the new scores there is no conversion.

    Raises:
        DataError: other benchmarks, or fewer than five answers judged by both.
    """
    if old.benchmark != new.benchmark:
        raise DataError(f"{old.benchmark} and {new.benchmark} are two benchmarks")
    places = {identity: place for place, identity in enumerate(new.ids)}
    pairs = [(i, places[identity]) for i, identity in enumerate(old.ids) if identity in places]
    if len(pairs) < _FEWEST:
        raise DataError(
            f"{old.benchmark}: {len(pairs)} answers were judged by both; a comparison of judges "
            f"needs {_FEWEST} or more"
        )
    mine, theirs = [i for i, _ in pairs], [i for _, i in pairs]
    ours, others = old.figures(old.stats[mine]), new.figures(new.stats[theirs])
    units = [old.units[i] for i in mine]
    categories = [_category(old.items[i]) if old.items else "" for i in mine]
    figures: Json = {}
    for name in ours:
        a, b = np.asarray(ours[name], float), np.asarray(others[name], float)
        known = ~(np.isnan(a) | np.isnan(b))
        if "/" not in name and known.sum() >= _FEWEST:
            kept = np.flatnonzero(known).tolist()
            figures[name] = _agreement(
                a[kept], b[kept], [units[i] for i in kept], [categories[i] for i in kept], seed
            )
    return {
        "benchmark": old.benchmark,
        "answers": len(pairs),
        "old": _judge_of(old),
        "new": _judge_of(new),
        "figures": figures,
    }


def _agreement(
    a: Stats, b: Stats, units: Sequence[str], categories: Sequence[str], seed: int
) -> Json:
    draws = _weighted(a, b, units, seed)
    bias = (draws["b"] - draws["a"]) / draws["n"]
    spread = float(b.std())
    correlation = float(np.corrcoef(a, b)[0, 1]) if spread > 0 and a.std() > 0 else None
    by_category = {
        category: {
            "bias": float((b - a)[own].mean()),
            "answers": len(own),
        }
        for category in sorted(set(categories) - {""})
        for own in [[i for i, name in enumerate(categories) if name == category]]
    }
    return {
        "old": float(a.mean()),
        "new": float(b.mean()),
        "bias": float((b - a).mean()),
        "bias_interval": np.percentile(bias, [2.5, 97.5]).tolist(),
        "equal": float(np.isclose(a, b).mean()),
        "correlation": correlation,
        "by_category": by_category,
        "conversion": _line(a, b, draws) if spread > 0 else None,
    }


def _weighted(a: Stats, b: Stats, units: Sequence[str], seed: int) -> dict[str, Stats]:
    """Sums (R,) of what a line needs, over resamples of the units."""
    columns = np.stack([np.ones(len(a)), a, b, b * b, a * b], axis=1)
    sums = unit_sums(units, columns)
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    drawn = sums[picks].sum(axis=1)
    return dict(zip(("n", "a", "b", "bb", "ab"), drawn.T, strict=True))


def _line(a: Stats, b: Stats, draws: dict[str, Stats]) -> Json:
    slope, intercept = np.polyfit(b, a, 1).tolist()
    variance = draws["bb"] - draws["b"] ** 2 / draws["n"]
    usable = variance > 1e-12 * np.maximum(draws["bb"], 1e-12)
    d = {name: values[usable] for name, values in draws.items()}
    slopes = (d["ab"] - d["a"] * d["b"] / d["n"]) / variance[usable]
    intercepts = (d["a"] - slopes * d["b"]) / d["n"]
    covariance = np.cov(intercepts, slopes).tolist()
    return {"intercept": intercept, "slope": slope, "covariance": covariance}


def converted(conversion: Json, value: float) -> tuple[float, float, float]:
    """Turn a new judge's figure into the old one's: value, and the ends of a 95 % interval.

    The interval is that of the conversion; what the figure itself is unsure of comes on top.
    """
    (vi, c), (_, vs) = conversion["covariance"]
    found = conversion["intercept"] + conversion["slope"] * value
    reach = _Z * math.sqrt(max(vi + 2 * value * c + value * value * vs, 0.0))
    return found, found - reach, found + reach


def converted_lines(path: Path, scored: Scored) -> dict[str, str]:
    """What a result's figures are worth at the old judge, by a file that ``rejudged`` made.

    Returns:
        texts for the provenance, by ``figure at the old judge``.

    Raises:
        DataError: the file is no calibration, or of another benchmark, judge or prompt.
    """
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))[scored.benchmark]
        wanted, figures = tree["new"], tree["figures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no calibration of {scored.benchmark} ({error!r:.80}); give the rejudge.json "
            "that --rejudge wrote"
        ) from error
    if wanted != _judge_of(scored):
        raise DataError(
            f"{path}: is about the judge {wanted}, and this result is by {_judge_of(scored)}; "
            "judge with the same model and prompt"
        )
    lines = {}
    for name, value in scored.metrics().items():
        line = figures.get(name, {}).get("conversion")
        if line is not None and not math.isnan(value):
            shown = "{:.4g} [{:.4g}, {:.4g}]".format(*converted(line, value))
            lines[f"converted {name} at {tree['old']['judge']}"] = shown
    return lines


def rejudge_lines(found: Json) -> list[str]:
    """Write out what ``rejudged`` found."""
    lines = [
        f"{found['benchmark']}: {found['answers']} answers judged by {found['old']['judge']} (old) "
        f"and {found['new']['judge']} (new)"
    ]
    for name, row in found["figures"].items():
        low, high = row["bias_interval"]
        correlation = row["correlation"]
        lines.append(
            f"  {name}: old {row['old']:.4g}, new {row['new']:.4g}, new - old {row['bias']:+.4g} "
            f"[{low:+.4g}, {high:+.4g}], equal {100 * row['equal']:.0f} %, correlation "
            f"{'–' if correlation is None else f'{correlation:.2f}'}"
        )
        lines += [
            f"    {category}: {part['bias']:+.4g} ({part['answers']})"
            for category, part in row["by_category"].items()
        ]
        if row["conversion"] is not None:
            value, low, high = converted(row["conversion"], row["new"])
            lines.append(
                f"    old = {row['conversion']['intercept']:.4g} + "
                f"{row['conversion']['slope']:.4g} new; {row['new']:.4g} is {value:.4g} "
                f"[{low:.4g}, {high:.4g}]"
            )
    return lines


def _category(item: Json) -> str:
    return next((str(item[key]) for key in _CATEGORIES if item.get(key)), "")


def _judge_of(scored: Scored) -> dict[str, str]:
    """Judge, and prompts with their digests, as the provenance has them."""
    about = scored.provenance
    keys = ("judge", "prompt", "rules", "stage1", "extractor", "verifier", "verifier prompt")
    found = {key: about[key] for key in keys if key in about}
    found.setdefault("judge", found.get("verifier", "unknown"))
    return found
