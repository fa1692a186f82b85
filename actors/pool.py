"""N replicas of an engine as one: split work evenly by cost, gather in the order given."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def split_by_cost(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Assign items to ``parts`` replicas so that their summed costs are close.

    Longest first onto the least loaded replica; deterministic. Returns the item indexes of each
    replica in ascending order; a replica may get none.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        target = loads.index(min(loads))
        shares[target].append(index)
        loads[target] += costs[index]
    return [sorted(share) for share in shares]


def merge_in_order(shares: Sequence[Sequence[int]], results: Sequence[Sequence[T]]) -> list[T]:
    """Put the replicas' results back into the order of the items.

    Raises:
        ValueError: a replica returned another number of results than it had items.
    """
    pairs: list[tuple[int, T]] = []
    for share, answers in zip(shares, results, strict=True):
        pairs += zip(share, answers, strict=True)
    return [answer for _, answer in sorted(pairs, key=lambda pair: pair[0])]
