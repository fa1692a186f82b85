"""The log of a probability ratio, kept where exp is finite."""

from typing import TYPE_CHECKING, TypeVar

from fgaif.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor  # not for those who only read numbers: it takes seconds to import

MAX_LOG_RATIO = 20.0
"""verl bounds log-ratios likewise. exp(20) is 5e8: no policy in use comes near it."""

A = TypeVar("A", "Tensor", FloatArray)


def bounded(log_ratio: A) -> A:
    """Clamp to [-MAX_LOG_RATIO, MAX_LOG_RATIO]; no gradient flows beyond, NaN stays NaN.

    Unbounded, exp overflows in float32 at 89, and infinity times an advantage of 0 is NaN.
    """
    return log_ratio.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
