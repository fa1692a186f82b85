"""What the driver may ask of each role. Every call starts at once and returns a pending result."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fgaif.pending import Pending
from fgaif.types import (
    Evaluation,
    FloatArray,
    GenerationRequest,
    Prompt,
    Response,
    Segment,
    SegmentScores,
    TrainBatch,
    UpdateReport,
    WeightsManifest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncCheck:
    """What one engine showed after loading a version.

    Differences are of log-probs of the probe's tokens, learner against engine; ``noise`` is the
    mean difference under the checkpoint, reference against engine.
    """

    arrived: float
    mean_abs_diff: float = 0.0
    max_abs_diff: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Responses, and log-probs of their tokens one after the other (N,): ``expected`` under the
    version, from the learner, and ``reference`` under the checkpoint, from the reference."""

    responses: Sequence[Response]
    expected: FloatArray
    reference: FloatArray

    @property
    def effect(self) -> float:
        """Mean |difference| that the version makes."""
        return float(abs(self.expected - self.reference).mean())


class Rollouts(Protocol):
    """All rollout engines as one."""

    def generate(
        self, requests: Sequence[GenerationRequest], *, version: int | None = None
    ) -> Pending[list[Response | None]]:
        """Sample one response per request, in order, with a loaded version (by default the newest).

        None where a sample was set aside because it keeps killing engines.
        """
        ...

    def p_yes(self, prompts: Sequence[Prompt]) -> Pending[list[float]]:
        """Probability of answering yes rather than no, per prompt."""
        ...

    def load_weights(self, manifest: WeightsManifest, probe: Probe) -> Pending[Sequence[SyncCheck]]:
        """Load a version on every engine and check what each holds of it; what they showed.

        Raises (from the result):
            SyncError: an engine holds another version, too little of it, or scores the probe
                differently.
        """
        ...


class Rewards(Protocol):
    """The reward models of all kinds as one."""

    def score(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> Pending[list[SegmentScores]]:
        """Class probabilities (S, K, C) of each response's segments."""
        ...


class Reference(Protocol):
    """Frozen reference policy and trained value model.

    Where the estimator has no critic only ``evaluate`` is called, and gives no values.
    """

    def evaluate(self, responses: Sequence[Response]) -> Pending[list[Evaluation]]:
        """Reference log-probs of each response, and values where there is a critic."""
        ...

    def update_values(self, batch: TrainBatch) -> Pending[UpdateReport]:
        """Train the value model on the batch's returns."""
        ...

    def save(self, path: Path) -> Pending[None]:
        """Write the value model and its optimiser into ``path``."""
        ...

    def set_restore_point(self, path: Path) -> None:
        """What ``save`` wrote lies at ``path`` for good now: a lost state is rebuilt from there."""
        ...

    def restore(self, path: Path) -> Pending[None]:
        """Read what ``save`` wrote."""
        ...


class Learner(Protocol):
    """The policy under training, over all DeepSpeed ranks."""

    def logprobs(self, responses: Sequence[Response]) -> Pending[list[FloatArray]]:
        """Log-probs (T,) of each response under the current policy and the training dtype."""
        ...

    def update(self, batch: TrainBatch, anchors: Sequence[Prompt]) -> Pending[UpdateReport]:
        """Run PPO's epochs over the batch."""
        ...

    def publish(self, version: int) -> Pending[WeightsManifest]:
        """Hand out the adapter as a numbered version."""
        ...

    def save(self, path: Path) -> Pending[None]:
        """Write adapter, optimiser, schedule and RNG into ``path``."""
        ...

    def set_restore_point(self, path: Path) -> None:
        """What ``save`` wrote lies at ``path`` for good now: a lost state is rebuilt from there."""
        ...

    def restore(self, path: Path) -> Pending[None]:
        """Read what ``save`` wrote."""
        ...

    def save_adapter(self, path: Path) -> Pending[None]:
        """Write the adapter as a PEFT directory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everyone the PPO loop works with."""

    rollouts: Rollouts
    rewards: Rewards
    reference: Reference
    learner: Learner
