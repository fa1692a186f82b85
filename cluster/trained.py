"""The roles that learn: the policy's DeepSpeed ranks, and the reference and value actor."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from cluster.handles import Handle, Pool
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


class ReferenceClient:
    """The reference and value actor."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def evaluate(self, responses: Sequence[Response]) -> Pending[list[Evaluation]]:
        """Reference log-probs and values."""
        return self._handle.call(lambda actor: actor.evaluate, responses)

    def update_values(self, batch: TrainBatch) -> Pending[UpdateReport]:
        """Train the value model."""
        return self._handle.call(lambda actor: actor.update_values, batch)

    def save(self, path: Path) -> Pending[None]:
        """Write its state."""
        return self._handle.call(lambda actor: actor.save, path)

    def restore(self, path: Path) -> Pending[None]:
        """Read its state."""
        return self._handle.call(lambda actor: actor.restore, path)

    def stop(self) -> None:
        """Stop the actor."""
        self._handle.stop()


class LearnerGroup(Pool):
    """All DeepSpeed ranks as one. Every rank takes part in every call; rank 0 answers for all."""

    def logprobs(self, responses: Sequence[Response]) -> Pending[list[FloatArray]]:
        """Equal counts per rank: under ZeRO-3 every forward pass is a collective."""
        ranks = len(self.handles)
        shares = [list(range(rank, len(responses), ranks)) for rank in range(ranks)]
        return self.share(lambda actor: actor.logprobs, responses, shares)

    def update(self, batch: TrainBatch, anchors: Sequence[Prompt]) -> Pending[UpdateReport]:
        """Every rank takes its share of each minibatch."""
        return self._first(lambda actor: actor.update, ray.put(batch), anchors)

    def publish(self, version: int) -> Pending[WeightsManifest]:
        """Gather the adapter (a collective under ZeRO-3) and number it."""
        return self._first(lambda actor: actor.publish, version)

    def save(self, path: Path) -> Pending[None]:
        """Every rank writes its part."""
        return self._first(lambda actor: actor.save, path)

    def restore(self, path: Path) -> Pending[None]:
        """Every rank reads its part."""
        return self._first(lambda actor: actor.restore, path)

    def save_adapter(self, path: Path) -> Pending[None]:
        """Write the adapter as a PEFT directory."""
        return self._first(lambda actor: actor.save_adapter, path)

    def _first(self, method: Callable[[Any], Any], *arguments: Any) -> Pending[Any]:
        everyone = self.everywhere(method, *arguments)
        return Then(lambda: everyone.result()[0])
