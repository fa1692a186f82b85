"""The roles that learn: the policy's DeepSpeed ranks, and the reference and value actor."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from cluster.team import Submit, Team
from fgaif.pending import Pending, Then
from fgaif.types import (
    Evaluation,
    FloatArray,
    Prompt,
    Response,
    TrainBatch,
    UpdateReport,
    WeightsManifest,
)


class _Trained:
    """State that is saved, and brought back when an actor dies."""

    def __init__(self, team: Team) -> None:
        self.team = team

    def save(self, path: Path) -> Pending[None]:
        """Every actor writes its part of the state."""
        return _first(self.team.save(_all(lambda actor: actor.save, path)))

    def settle(self, path: Path) -> None:
        """What ``save`` wrote lies at ``path`` now: bring the actors back from there."""
        self.team.settle(_all(_restore, path))

    def restore(self, path: Path) -> Pending[None]:
        """Every actor reads its part."""
        return _first(self.team.restore(_all(_restore, path)))

    def stop(self) -> None:
        """Stop every actor."""
        self.team.stop()


class ReferenceClient(_Trained):
    """The reference and value actor. Values trained before it died are trained again."""

    def evaluate(self, responses: Sequence[Response]) -> Pending[list[Evaluation]]:
        """Reference log-probs and values."""
        return _first(self.team.call(_all(lambda actor: actor.evaluate, responses)))

    def update_values(self, batch: TrainBatch) -> Pending[UpdateReport]:
        """Train the value model."""
        submit = _all(lambda actor: actor.update_values, batch)
        return _first(self.team.call(submit, keep=True))


class LearnerGroup(_Trained):
    """All DeepSpeed ranks as one. Every rank takes part in every call; rank 0 answers for all.

    If one dies, all are started anew and trained again from the last checkpoint.
    """

    def logprobs(self, responses: Sequence[Response]) -> Pending[list[FloatArray]]:
        """Every rank scores its share of the responses."""
        answers = self.team.call(_all(lambda actor: actor.logprobs, responses))
        return Then(lambda: _merged(answers.result()))

    def update(self, batch: TrainBatch, anchors: Sequence[Prompt]) -> Pending[UpdateReport]:
        """Every rank takes its share of each minibatch."""
        submit = _all(lambda actor: actor.update, batch, anchors)
        return _first(self.team.call(submit, keep=True))

    def publish(self, version: int) -> Pending[WeightsManifest]:
        """Gather the adapter (a collective under ZeRO-3) and number it."""
        return _first(self.team.call(_all(lambda actor: actor.publish, version)))

    def save_adapter(self, path: Path) -> Pending[None]:
        """Write the adapter as a PEFT directory."""
        return _first(self.team.call(_all(lambda actor: actor.save_adapter, path)))


def _restore(actor: Any) -> Any:
    return actor.restore


def _all(method: Callable[[Any], Any], *arguments: Any) -> Submit:
    """The same call on every actor. One copy of each argument goes into the object store, for as
    long as the call lasts; a journal holds the arguments themselves."""

    def submit(actors: Sequence[Any]) -> list[ray.ObjectRef]:
        stored = [ray.put(argument) for argument in arguments]
        return [method(actor).remote(*stored) for actor in actors]

    return submit


def _merged(shares: Sequence[Sequence[FloatArray | None]]) -> list[FloatArray]:
    """One row for each response, from the rank that has it."""
    return [next(row for row in rows if row is not None) for rows in zip(*shares, strict=True)]


def _first(answers: Pending[list[Any]]) -> Pending[Any]:
    return Then(lambda: answers.result()[0])
