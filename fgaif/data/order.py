"""Which prompts and seeds a step gets: functions of the step alone, so resume is exact."""

import hashlib
from collections.abc import Sequence

import numpy as np


def batch_indexes(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Indexes of step ``step`` (from 0) in an endless sequence of reshuffled epochs.

    Epoch e is a permutation of ``range(count)`` drawn from (seed, e); steps cut the sequence of
    epochs into pieces of ``batch``, so over any epoch each prompt is seen once.
    """
    first = step * batch
    epochs = range(first // count, (first + batch - 1) // count + 1)
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(count) for e in epochs])
    offset = first - epochs[0] * count
    return [int(index) for index in order[offset : offset + batch]]


def request_seed(*parts: int | str) -> int:
    """A 31-bit sampling seed from what identifies a request, e.g. (seed, step, prompt id)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def draw(items: Sequence[int], size: int, *key: int) -> list[int]:
    """Draw ``size`` of ``items`` without replacement (with, if there are fewer), seeded by key."""
    rng = np.random.default_rng(list(key))
    return [int(i) for i in rng.choice(items, size, replace=len(items) < size)]
