"""How well scores tell hallucinated from right: figures, and scores laid over annotated spans.

A score is high where something is believed to be hallucinated. The unit of resampling is the
response.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fgaif.eval.detection_data import GoldSpan, GoldText
from fgaif.kinds import words
from fgaif.types import Json, Kind

RESAMPLES = 500
_BINS = 10
_HALF = 0.5
ANY = "any"
"""In place of a kind: hallucinated in whatever way, and the highest of all kinds' scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSpan:
    """A segment of a text, characters [start, end), and what is believed of it in [0, 1] by kind.

    A model without kinds gives ``ANY`` alone.
    """

    start: int
    end: int
    scores: dict[Kind, float]

    def score(self, kind: Kind) -> float | None:
        """The score of a kind; for ``ANY`` the highest; None if the model has no such kind."""
        return max(self.scores.values(), default=None) if kind == ANY else self.scores.get(kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One thing to be told: a segment or a response. ``group`` is its response."""

    group: str
    hallucinated: bool
    score: float
    length: float
    place: float


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Chance that a hallucinated one scores higher than a right one, ties a half; NaN if one of the
    two is missing."""
    values, true = np.asarray(scores, np.float64), np.asarray(labels, bool)
    positives, negatives = int(true.sum()), int((~true).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of equals, from 1
    return float((ranks[true].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean over thresholds of precision, weighted by the gain in recall; equal scores are one
    threshold. NaN without a hallucinated one."""
    values, true = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if not true.any():
        return float("nan")
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(values[order]) != 0, True])
    hits = np.cumsum(true[order])[ends]
    gains = np.diff(np.r_[0, hits])
    return float((gains * hits / (ends + 1)).sum() / hits[-1])


def f1_score(scores: ArrayLike, labels: ArrayLike, threshold: float = _HALF) -> float:
    """F1 of "hallucinated" where scores above ``threshold`` say so; 0 without a hit."""
    called, true = np.asarray(scores) > threshold, np.asarray(labels, bool)
    hits = int((called & true).sum())
    return 2 * hits / int(called.sum() + true.sum()) if hits else 0.0


def calibration_error(scores: ArrayLike, labels: ArrayLike) -> float:
    """Expected calibration error of the scores as probabilities of hallucinated, ten equal bins."""
    values, true = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    which = np.minimum((values * _BINS).astype(int), _BINS - 1)
    gaps = [abs((true[which == b] - values[which == b]).sum()) for b in range(_BINS)]
    return float(sum(gaps) / len(values))


Statistic = Callable[[ArrayLike, ArrayLike], float]


def detection_figures(units: Sequence[Unit], *, seed: int = 0) -> Json:
    """Figures of one set of units, with intervals over responses, beside simple baselines.

    Baselines are AUROC and average precision of the unit's length, of its place in the response
    (later is worse), and the share of hallucinated units, which is the average precision of chance.
    """
    labels = [unit.hallucinated for unit in units]
    scores = [unit.score for unit in units]
    statistics: dict[str, Statistic] = {
        "auroc": auroc,
        "average_precision": average_precision,
        "f1": f1_score,
        "calibration_error": calibration_error,
    }
    draws = _draws([unit.group for unit in units], seed)
    values = np.asarray(scores), np.asarray(labels)
    figures: Json = {}
    for name, statistic in statistics.items():
        drawn = [statistic(values[0][rows], values[1][rows]) for rows in draws]
        known = [value for value in drawn if value == value]
        interval = np.percentile(known, [2.5, 97.5]).tolist() if known else [None, None]
        figures[name] = {"value": _known(statistic(scores, labels)), "interval": interval}
    lengths, places = [unit.length for unit in units], [unit.place for unit in units]
    return figures | {
        "units": len(units),
        "hallucinated": sum(labels) / len(units),
        "baselines": {
            name: {
                "auroc": _known(auroc(by, labels)),
                "average_precision": _known(average_precision(by, labels)),
            }
            for name, by in (("length", lengths), ("place", places))
        },
    }


def _draws(groups: Sequence[str], seed: int) -> list[NDArray[np.int64]]:
    """Rows of resampled units: groups are drawn with replacement, with all their units."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    members = [np.array(own) for own in rows.values()]
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(members), size=(RESAMPLES, len(members)))
    return [np.concatenate([members[pick] for pick in row]) for row in picks]


def _known(value: float) -> float | None:
    return value if value == value else None


def segment_label(segment: ScoredSpan, spans: Sequence[GoldSpan], kind: Kind) -> bool | None:
    """Whether a predicted segment is hallucinated by the annotated spans; None if nothing says.

    It is if a hallucinated span (of the kind) lies in it by half of the shorter of the two, right
    if otherwise a right span does, or one of another kind.
    """
    found: bool | None = None
    for span in spans:
        overlap = min(segment.end, span.end) - max(segment.start, span.start)
        shorter = min(segment.end - segment.start, span.end - span.start)
        if overlap <= 0 or overlap < _HALF * shorter or span.hallucinated is None:
            continue
        if span.hallucinated and kind in (ANY, span.kind):
            return True
        if kind == ANY or span.kind is None or span.kind == kind or span.hallucinated:
            found = False
    return found


def segment_units(
    texts: Sequence[GoldText], scored: Sequence[Sequence[ScoredSpan]], kind: Kind = ANY
) -> list[Unit]:
    """Predicted segments with the label of the spans under them; those without are left out."""
    return [
        Unit(
            group=text.group,
            hallucinated=label,
            score=score,
            length=segment.end - segment.start,
            place=segment.start,
        )
        for text, segments in zip(texts, scored, strict=True)
        for segment in segments
        if (label := segment_label(segment, text.spans, kind)) is not None
        and (score := segment.score(kind)) is not None
    ]


def response_units(
    texts: Sequence[GoldText], scored: Sequence[Sequence[ScoredSpan]], kind: Kind = ANY
) -> list[Unit]:
    """Responses: hallucinated if one of their spans is (of the kind); the worst segment scores."""
    groups: dict[str, list[tuple[GoldText, Sequence[ScoredSpan]]]] = {}
    for text, segments in zip(texts, scored, strict=True):
        groups.setdefault(text.group, []).append((text, segments))
    units = []
    for group, members in groups.items():
        spans = [span for text, _ in members for span in text.spans]
        scores = [
            score
            for _, segments in members
            for segment in segments
            if (score := segment.score(kind)) is not None
        ]
        if scores and any(span.hallucinated is not None for span in spans):
            units.append(
                Unit(
                    group=group,
                    hallucinated=any(s.hallucinated and kind in (ANY, s.kind) for s in spans),
                    score=max(scores),
                    length=sum(len(text.text) for text, _ in members),
                    place=0.0,
                )
            )
    return units


def detection_report(
    texts: Sequence[GoldText], scored: Sequence[Sequence[ScoredSpan]], *, seed: int = 0
) -> Json:
    """Figures per segment and per response, over all and by kind, where there are both labels.

    Kinds that are annotated and that no model scores are named under ``not_scored``.
    """
    kinds = sorted({s.kind for t in texts for s in t.spans if s.kind is not None})
    known = {kind for segments in scored for segment in segments for kind in segment.scores}
    report: Json = {"segment": {}, "response": {}, "not_scored": []}
    for kind in (ANY, *kinds):
        if kind != ANY and kind not in known:
            report["not_scored"].append(words(kind))
            continue
        for level, make in (("segment", segment_units), ("response", response_units)):
            units = make(texts, scored, kind)
            if len({unit.hallucinated for unit in units}) == 2:
                report[level][kind] = detection_figures(units, seed=seed)
    return report


def best_of_n(
    preferred: Sequence[int], scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]
) -> Json:
    """Share of questions whose preferred response scores best, beside taking the longest or the
    shortest; equal scores share a hit."""

    def accuracy(by: Sequence[Sequence[float]]) -> float:
        return sum(map(_hit, preferred, by)) / len(preferred)

    return {
        "questions": len(preferred),
        "accuracy": accuracy(scores),
        "baselines": {
            "longest": accuracy(lengths),
            "shortest": accuracy([[-length for length in row] for row in lengths]),
            "chance": sum(1 / len(row) for row in scores) / len(preferred),
        },
    }


def _hit(preferred: int, scores: Sequence[float]) -> float:
    best = max(scores)
    return (scores[preferred] == best) / sum(score == best for score in scores)
