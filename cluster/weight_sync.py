"""Bring a version of the policy from the learner to every rollout engine, and prove it arrived.

publish -> load on every engine -> each confirms the version -> each scores the probe like the
learner. An engine that joins or is replaced later goes through the same before it is given work.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.roles import Learner, Rollouts
from fgaif.errors import SyncError
from fgaif.pending import Pending, Then
from fgaif.types import FloatArray, Response

_PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Responses, the learner's log-probs of their tokens one after the other (N,), and how far an
    engine's may be from them."""

    responses: Sequence[Response]
    expected: FloatArray
    tolerance: float

    def check(self, engine: str, version: int, found: Sequence[FloatArray]) -> float:
        """Return the largest difference of an engine's log-probs.

        Raises:
            SyncError: it exceeds the tolerance, or is not a number.
        """
        difference = float(np.abs(np.concatenate(found) - self.expected).max())
        if not difference <= self.tolerance:  # also catches NaN
            raise SyncError(
                f"weights version {version}: log-probs of the probe differ by {difference:.3g} "
                f"between the learner and {engine}, more than ppo.probe_tolerance = "
                f"{self.tolerance:g}; with policy.dtype=bfloat16 raise the tolerance to about 0.3, "
                "otherwise the engine does not run the learner's weights"
            )
        return difference


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a sync moved and how far learner and engines are apart on the probe."""

    version: int
    bytes: int
    seconds: float
    max_abs_diff: float

    def metrics(self) -> dict[str, float]:
        """The report as scalar metrics."""
        return {
            "sync/bytes": float(self.bytes),
            "sync/seconds": self.seconds,
            "sync/max_abs_diff": self.max_abs_diff,
        }


def sync(
    learner: Learner,
    rollouts: Rollouts,
    probe: Sequence[Response],
    *,
    version: int,
    tolerance: float,
) -> Pending[SyncReport]:
    """Publish ``version`` and have every engine load it; the result is there when all have.

    The first 64 tokens of each probe response are scored by the learner and by every engine; the
    largest difference must not exceed ``tolerance``. Engines at work load it when they are through.

    Raises (from the result):
        SyncError: an engine holds another version afterwards, or disagrees with the learner.
    """
    start = time.perf_counter()
    manifest = learner.publish(version).result()
    short = [_head(response) for response in probe]
    expected = np.concatenate(learner.logprobs(short).result())
    loading = rollouts.load_weights(
        manifest, Probe(responses=short, expected=expected, tolerance=tolerance)
    )

    def finish() -> SyncReport:
        differences = loading.result()
        return SyncReport(
            version=version,
            bytes=sum(array.nbytes for array in manifest.tensors.values()),
            seconds=time.perf_counter() - start,
            max_abs_diff=max(differences),
        )

    return Then(finish)


def check_version(engine: str, version: int, confirmed: int) -> None:
    """Raise SyncError unless the engine has confirmed this version."""
    if confirmed != version:
        raise SyncError(
            f"weights version {version}: {engine} confirmed version {confirmed}; restart the run "
            "from its last checkpoint (ppo.resume=latest)"
        )


def _head(response: Response) -> Response:
    return replace(
        response,
        token_ids=response.token_ids[:_PROBE_TOKENS],
        rollout_logprobs=response.rollout_logprobs[:_PROBE_TOKENS],
    )
