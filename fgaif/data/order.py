"""Which prompts and seeds a step gets: functions of the step alone, so resume is exact."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_NEXT_ROUND = 10**9
"""More samples than any run takes of a prompt."""


def batch_indexes(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Indexes of step ``step`` (from 0) in an endless sequence of reshuffled epochs.

    Epoch e is a permutation of ``range(count)`` drawn from (seed, e); steps cut the sequence of
    epochs into pieces of ``batch``, so over any epoch each prompt is seen once.
    """
    first = step * batch
    epochs = range(first // count, (first + batch - 1) // count + 1)
    pieces = [
        _epoch(count, e, seed)[max(0, first - e * count) : first + batch - e * count]
        for e in epochs
    ]
    return [int(index) for piece in pieces for index in piece]


@lru_cache(maxsize=2)  # a step reaches from one epoch into the next at most, unless it is larger
def _epoch(count: int, epoch: int, seed: int) -> NDArray[np.int32]:
    """Order of one epoch, kept: drawing ten million indexes takes a second, a step much less."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(count, dtype=np.int32))


def sample_numbers(prompts: Sequence[str], step: int, size: int) -> list[int]:
    """Sample numbers that tell apart the responses to one prompt, in a step and over a run.

    The n-th request for a prompt in step ``step`` (from 0) is ``step * size + n`` where n is below
    ``size``. A prompt is asked for more often where a batch reaches from one epoch into the next
    or has fewer prompts than places; further rounds lie beyond the numbers of every step.

    Args:
        prompts: id of each request's prompt, in order.
        step: from 0.
        size: samples per prompt.
    """
    asked: Counter[str] = Counter()
    numbers = []
    for prompt in prompts:
        turn, n = divmod(asked[prompt], size)
        numbers.append(step * size + n + turn * _NEXT_ROUND)
        asked[prompt] += 1
    return numbers


def request_seed(*parts: int | str) -> int:
    """A 31-bit sampling seed from what identifies a request, e.g. (seed, step, prompt id)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def draw(items: Sequence[int], size: int, *key: int) -> list[int]:
    """Draw ``size`` of ``items`` without replacement (with, if there are fewer), seeded by key."""
    rng = np.random.default_rng(list(key))
    return [items[i] for i in rng.choice(len(items), size, replace=len(items) < size)]
