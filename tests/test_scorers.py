"""Scorers of one kind each, or of all kinds at once, are one to the driver."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from cluster.groups.role_groups import RewardGroup
from fgaif.pending import Pending, Ready
from fgaif.types import DEFAULT_KINDS, FloatArray, Response, Segment, SegmentClass


class Scorer:
    """Handle and actor in one: probabilities that name kind and response."""

    def __init__(self, kinds: Sequence[int], together: bool) -> None:
        self.kinds, self.together = kinds, together

    def call(self, method: Callable[[Any], Any], pairs: Sequence[Any]) -> Pending[Any]:
        return Ready(method(self)(pairs))

    def score_pairs(self, pairs: Sequence[tuple[Response, Sequence[Segment]]]) -> list[FloatArray]:
        rows = []
        for response, pieces in pairs:
            probs = np.zeros((len(pieces), len(self.kinds), len(SegmentClass)), np.float32)
            probs += 10 * len(response.token_ids) + np.array(self.kinds)[:, None]
            rows.append(probs if self.together else probs[:, 0])
        return rows


class Text:
    def __init__(self, tokens: int) -> None:
        self.token_ids = range(tokens)


@pytest.mark.parametrize("shared", [False, True])
def test_scores_are_stacked_by_kind_in_order(shared: bool) -> None:
    """Of two replicas each, which share three responses of 3, 2 and 0 segments."""
    every = list(range(len(DEFAULT_KINDS)))
    groups = [every] if shared else [[k] for k in every]
    group = RewardGroup(
        [[Scorer(kinds, shared) for _ in range(2)] for kinds in groups],  # type: ignore[misc]
        shared=shared,
    )
    scores = group.score([Text(5), Text(7), Text(9)], [[0] * 3, [0] * 2, []]).result()  # type: ignore[list-item]
    assert [score.probs.shape for score in scores] == [(3, 3, 3), (2, 3, 3), (0, 3, 3)]
    assert scores[0].probs[1, :, 0].tolist() == [50, 51, 52]
    assert scores[1].probs[0, :, 2].tolist() == [70, 71, 72]
