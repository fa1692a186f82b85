"""How well a reward model tells NONE, OK and HALLU apart."""

from dataclasses import asdict, dataclass

import numpy as np

from fgaif.types import FloatArray, IntArray, Json, SegmentClass

_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardMetrics:
    """Figures of one kind over N judged segments; a figure whose denominator is 0 is 0.

    ``accuracy`` over the segments that have facts (label OK or HALLU); ``precision``, ``recall``
    and ``f1_hallu`` of HALLU against the rest, over all segments; ``ece`` expected calibration
    error of the most likely class; ``none``, ``ok``, ``hallu`` the counts of the labels.
    """

    accuracy: float
    precision: float
    recall: float
    f1_hallu: float
    ece: float
    none: int
    ok: int
    hallu: int

    def as_floats(self) -> dict[str, float]:
        """Figures by name, for cards and logs."""
        return {name: float(value) for name, value in asdict(self).items()}


def reward_metrics(probs: FloatArray, labels: IntArray) -> RewardMetrics:
    """Compare probabilities (N, C) with labels (N,) in {NONE, OK, HALLU}."""
    predicted = probs.argmax(-1)
    has_facts = labels != SegmentClass.NONE
    true, called = labels == SegmentClass.HALLU, predicted == SegmentClass.HALLU
    hits = int((true & called).sum())
    precision, recall = _ratio(hits, called.sum()), _ratio(hits, true.sum())
    counts = np.bincount(labels, minlength=len(SegmentClass)).tolist()
    return RewardMetrics(
        accuracy=_ratio((predicted == labels)[has_facts].sum(), has_facts.sum()),
        precision=precision,
        recall=recall,
        f1_hallu=_ratio(2 * hits, called.sum() + true.sum()),
        ece=calibration_error(probs, labels),
        none=counts[SegmentClass.NONE],
        ok=counts[SegmentClass.OK],
        hallu=counts[SegmentClass.HALLU],
    )


def calibration_error(probs: FloatArray, labels: IntArray, bins: int = _BINS) -> float:
    """Expected calibration error: sum_b n_b / N |accuracy_b - confidence_b|.

    Segments fall into ``bins`` equal bins by the probability of their most likely class.
    """
    if not len(labels):
        return 0.0
    confidence = probs.max(-1)
    correct = probs.argmax(-1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs((correct[which == b] - confidence[which == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(labels))


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else 0.0


def calibration_bins(probs: FloatArray, labels: IntArray, bins: int = 10) -> list[Json]:
    """Sort segments into equal bins by the probability of their most likely class.

    probs (N, C), labels (N,) -> the bins that hold segments, each ``{"confidence", "accuracy",
    "count"}`` with the means over its segments.
    """
    confidence = probs.max(axis=1)
    correct = probs.argmax(axis=1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(correct[which == b].mean()),
            "count": int((which == b).sum()),
        }
        for b in np.unique(which)
    ]
