"""Bring a version of the policy from the learner to every rollout engine, and prove it arrived.

publish -> load on every replica -> every replica confirms the version -> probe on every replica.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.roles import Learner, Rollouts
from fgaif.errors import SyncError
from fgaif.types import Response

_PROBE_TOKENS = 64


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
) -> SyncReport:
    """Publish ``version``, load it everywhere and compare log-probs of the probe responses.

    The first 64 tokens of each probe response are scored by the learner and by every replica; the
    largest difference must not exceed ``tolerance``.

    Raises:
        SyncError: a replica holds another version afterwards, or disagrees with the learner.
    """
    start = time.perf_counter()
    manifest = learner.publish(version).result()
    confirmed = rollouts.load_weights(manifest).result()
    for replica, found in enumerate(confirmed):
        if found != version:
            raise SyncError(
                f"weights version {version}: rollout-{replica} confirmed version {found}; "
                "restart the run from its last checkpoint (ppo.resume=latest)"
            )
    short = [_head(response) for response in probe]
    pending = rollouts.probe_logprobs(short)
    expected = np.concatenate(learner.logprobs(short).result())
    differences = [
        float(np.abs(np.concatenate(found) - expected).max()) for found in pending.result()
    ]
    for replica, difference in enumerate(differences):
        if not difference <= tolerance:  # also catches NaN
            raise SyncError(
                f"weights version {version}: log-probs of the probe differ by {difference:.3g} "
                f"between the learner and rollout-{replica}, more than ppo.probe_tolerance = "
                f"{tolerance:g}; with policy.dtype=bfloat16 raise the tolerance to about 0.3, "
                "otherwise the engine does not run the learner's weights"
            )
    return SyncReport(
        version=version,
        bytes=sum(array.nbytes for array in manifest.tensors.values()),
        seconds=time.perf_counter() - start,
        max_abs_diff=max(differences),
    )


def _head(response: Response) -> Response:
    return replace(
        response,
        token_ids=response.token_ids[:_PROBE_TOKENS],
        rollout_logprobs=response.rollout_logprobs[:_PROBE_TOKENS],
    )
