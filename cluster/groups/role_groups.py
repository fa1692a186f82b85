"""The roles as the driver calls them: judges, reward models, learner, reference and value."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup

from actors.pool import merge_in_order, split_by_cost
from cluster.groups.actor_group import ActorGroup, FailureDetector, RestartLimits, Submit
from cluster.groups.placed_actor import PlacedActor
from cluster.groups.shared_process import RolePart
from fgaif.chat.messages import ChatRequest, Reply
from fgaif.pending import Pending, Then
from fgaif.types import (
    Evaluation,
    FloatArray,
    Prompt,
    Response,
    Segment,
    SegmentClass,
    SegmentScores,
    TrainBatch,
    UpdateReport,
    WeightsManifest,
)


class _StatefulGroup:
    """State that is saved, and brought back when an actor dies."""

    def __init__(self, actor_group: ActorGroup | RolePart) -> None:
        self.actor_group = actor_group

    def save(self, path: Path) -> Pending[None]:
        """Every actor writes its part of the state."""
        return _first(self.actor_group.save(_all(lambda actor: actor.save, path)))

    def set_restore_point(self, path: Path) -> None:
        """What ``save`` wrote lies at ``path`` now: bring the actors back from there."""
        self.actor_group.set_restore_point(_all(_restore, path))

    def restore(self, path: Path) -> Pending[None]:
        """Every actor reads its part."""
        return _first(self.actor_group.restore(_all(_restore, path)))

    def stop(self) -> None:
        """Stop every actor."""
        self.actor_group.stop()


class ReferenceGroup(_StatefulGroup):
    """The reference and value actor. Values trained before it died are trained again."""

    def evaluate(self, responses: Sequence[Response]) -> Pending[list[Evaluation]]:
        """Reference log-probs and values."""
        return _first(self.actor_group.call(_all(lambda actor: actor.evaluate, responses)))

    def update_values(self, batch: TrainBatch) -> Pending[UpdateReport]:
        """Train the value model."""
        submit = _all(lambda actor: actor.update_values, batch)
        return _first(self.actor_group.call(submit, keep=True))


class LearnerGroup(_StatefulGroup):
    """All DeepSpeed ranks as one. Every rank takes part in every call; rank 0 answers for all.

    If one dies, all are started anew and trained again from the last checkpoint.
    """

    def logprobs(self, responses: Sequence[Response]) -> Pending[list[FloatArray]]:
        """Every rank scores its share of the responses."""
        answers = self.actor_group.call(_all(lambda actor: actor.logprobs, responses))
        return Then(lambda: _merged(answers.result()))

    def update(self, batch: TrainBatch, anchors: Sequence[Prompt]) -> Pending[UpdateReport]:
        """Every rank takes its share of each minibatch."""
        submit = _all(lambda actor: actor.update, batch, anchors)
        return _first(self.actor_group.call(submit, keep=True))

    def publish(self, version: int) -> Pending[WeightsManifest]:
        """Gather the adapter (a collective under ZeRO-3) and number it."""
        return _first(self.actor_group.call(_all(lambda actor: actor.publish, version)))

    def save_adapter(self, path: Path) -> Pending[None]:
        """Write the adapter as a PEFT directory."""
        return _first(self.actor_group.call(_all(lambda actor: actor.save_adapter, path)))


def _restore(actor: Any) -> Any:
    return actor.restore


def _all(method: Callable[[Any], Any], *arguments: Any) -> Submit:
    """The same call on every actor. One copy of each argument goes into the object store, for as
    long as the call lasts; the replay log holds the arguments themselves."""

    def submit(actors: Sequence[Any]) -> list[ray.ObjectRef]:
        stored = [ray.put(argument) for argument in arguments]
        return [method(actor).remote(*stored) for actor in actors]

    return submit


def _merged(shares: Sequence[Sequence[FloatArray | None]]) -> list[FloatArray]:
    """One row for each response, from the rank that has it."""
    return [next(row for row in rows if row is not None) for rows in zip(*shares, strict=True)]


def _first(answers: Pending[list[Any]]) -> Pending[Any]:
    return Then(lambda: answers.result()[0])


Create = Callable[[], tuple[Any, PlacementGroup]]
"""Starts an actor in a placement group of its own and returns both."""


class StatelessActor:
    """A named actor without state that matters; replaced when it dies, as ``limits`` allow."""

    def __init__(
        self, name: str, create: Create, limits: RestartLimits, watch: FailureDetector | None = None
    ) -> None:
        self.name = name
        self.actor_group = ActorGroup(name, lambda: [PlacedActor(name, *create())], limits, watch)

    def call(self, method: Callable[[Any], Any], *arguments: Any) -> Pending[Any]:
        """Start ``method(actor).remote(*arguments)``; ``result`` names the actor if it fails."""
        return _first(self.actor_group.call(lambda actors: [method(actors[0]).remote(*arguments)]))

    def stop(self) -> None:
        """Kill the actor and free its resources."""
        self.actor_group.stop()


class ReplicaGroup:
    """Replicas of one actor class: split work or ask everyone."""

    def __init__(self, handles: Sequence[StatelessActor]) -> None:
        self.handles = handles

    def spread(
        self, method: Callable[[Any], Any], items: Sequence[Any], costs: Sequence[float]
    ) -> Pending[Any]:
        """Split the items by cost, call every replica with its share, merge in order."""
        shares = split_by_cost(costs, len(self.handles))
        calls = [
            handle.call(method, [items[index] for index in indexes])
            for handle, indexes in zip(self.handles, shares, strict=True)
        ]
        return Then(lambda: merge_in_order(shares, [call.result() for call in calls]))

    def stop(self) -> None:
        """Stop every replica."""
        for handle in self.handles:
            handle.stop()


class JudgeGroup(ReplicaGroup):
    """All verifier engines as one."""

    def answer(self, requests: Sequence[ChatRequest]) -> Pending[list[Reply | None]]:
        """Split by length of the answer, ask everywhere, return in order."""
        costs = [1.0 if request.yes_no else float(request.max_tokens) for request in requests]
        return self.spread(lambda actor: actor.answer, requests, costs)


class PreferenceGroup:
    """Actors with the one preference model: a number for each response, and probs that say NONE."""

    def __init__(self, replicas: Sequence[StatelessActor], kinds: int) -> None:
        self._group, self._kinds = ReplicaGroup(replicas), kinds

    def score(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> Pending[list[SegmentScores]]:
        """Score responses as wholes."""
        items = list(zip(responses, segments, strict=True))
        costs = [float(len(response.token_ids)) for response in responses]
        call = self._group.spread(lambda actor: actor.score_pairs, items, costs)

        def finish() -> list[SegmentScores]:
            scores = []
            for reward, pieces in zip(call.result(), segments, strict=True):
                probs = np.zeros((len(pieces), self._kinds, len(SegmentClass)), dtype=np.float32)
                probs[..., SegmentClass.NONE] = 1.0
                scores.append(SegmentScores(probs=probs, reward=float(reward)))
            return scores

        return Then(finish)

    def stop(self) -> None:
        """Stop the scorers."""
        self._group.stop()


class RewardGroup:
    """One actor (or several) per kind, whose scores are stacked to (S, K, C), or for all kinds."""

    def __init__(
        self, handles: Sequence[Sequence[StatelessActor]], *, shared: bool = False
    ) -> None:
        """``handles``: the actors of each kind in order, or, ``shared``, those of all kinds."""
        self._kinds = [ReplicaGroup(replicas) for replicas in handles]
        self._shared = shared

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
            if self._shared:
                return [SegmentScores(probs=probs) for probs in kinds[0]]
            return [
                SegmentScores(probs=np.stack(rows, axis=1)) for rows in zip(*kinds, strict=True)
            ]

        return Then(finish)

    def stop(self) -> None:
        """Stop every scorer."""
        for group in self._kinds:
            group.stop()
