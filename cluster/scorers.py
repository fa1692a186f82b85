"""Judges and reward models as one each: calls that any replica answers alike."""

from collections.abc import Sequence

import numpy as np

from cluster.handles import Handle, Pool
from fgaif.chat.messages import ChatRequest, Reply
from fgaif.pending import Pending, Then
from fgaif.types import Response, Segment, SegmentScores


class JudgeGroup(Pool):
    """All verifier engines as one."""

    def answer(self, requests: Sequence[ChatRequest]) -> Pending[list[Reply | None]]:
        """Split by length of the answer, ask everywhere, return in order."""
        costs = [1.0 if request.yes_no else float(request.max_tokens) for request in requests]
        return self.spread(lambda actor: actor.answer, requests, costs)


class RewardGroup:
    """One actor (or several) per kind, whose scores are stacked to (S, K, C), or for all kinds."""

    def __init__(self, handles: Sequence[Sequence[Handle]]) -> None:
        """``handles``: the actors of each kind in order, or those that score all kinds."""
        self._kinds = [Pool(replicas) for replicas in handles]

    def score(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> Pending[list[SegmentScores]]:
        """Score every kind at the same time."""
        items = list(zip(responses, segments, strict=True))
        costs = [float(len(response.token_ids)) for response in responses]
        calls = [
            group.spread(lambda actor: actor.score_pairs, items, costs) for group in self._kinds
        ]

        def finish() -> list[SegmentScores]:
            kinds = [call.result() for call in calls]
            if len(kinds) == 1:
                return [SegmentScores(probs=probs) for probs in kinds[0]]
            return [
                SegmentScores(probs=np.stack(rows, axis=1)) for rows in zip(*kinds, strict=True)
            ]

        return Then(finish)

    def stop(self) -> None:
        """Stop every scorer."""
        for group in self._kinds:
            group.stop()
