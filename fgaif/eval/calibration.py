"""Reliability of class probabilities: how often a reward model is right at each confidence."""

import numpy as np

from fgaif.types import FloatArray, IntArray, Json


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
