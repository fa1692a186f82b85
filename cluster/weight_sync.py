"""Bring a version of the policy from the learner to every rollout engine, and prove it arrived.

publish -> load on every engine -> each confirms the version, says how much of the update it holds,
and scores the probe like the learner. An engine that joins or is replaced later goes through the
same before it is given work.

Two proofs, because each sees what the other cannot. The share that arrived is read from the
engine's own tensors and is exact however small the update is. The probe's log-probs say that those
tensors are used as the learner uses them; they are held against the noise of the dtype, which is
how far the two are apart under the checkpoint itself.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

import numpy as np

from cluster.roles import Learner, Probe, Reference, Rollouts, SyncCheck
from fgaif.errors import SyncError
from fgaif.pending import Pending, Then
from fgaif.types import Arrived, FloatArray, LoadedWeights, Response

PROBE_RESPONSES = 8
_PROBE_TOKENS = 64
LEAST_ARRIVED = 0.9
"""A smaller share of the update in an engine stops the run; so does one as far above 1."""
_LEAST_OF_LAYER = 0.5
# Measured on the embedded policy and its adapter, over groups of 8 responses: in bfloat16 the clean
# difference is 1.0 to 2.1 times the noise of the base, at an effect 90 to 160 times the noise; in
# float32 both are below 1e-6. A stale or a swapped adapter differs by 38 times the noise or more.
_NOISE_FACTOR = 3.0
_EFFECT_FACTOR = 0.01
_FLOOR = 1e-4


def check_load(
    engine: str, version: int, loaded: LoadedWeights, probe: Probe | None, noise: float = 0.0
) -> SyncCheck:
    """Check what an engine says of a version that it was to load.

    ``noise`` is what was measured before, for engines that cannot answer as the base any more.

    Raises:
        SyncError: another version, too little of the update, or other log-probs than the learner's.
    """
    check_version(engine, version, loaded.version)
    _check_arrived(engine, version, loaded.arrived)
    if probe is None:
        return SyncCheck(arrived=loaded.arrived.share, noise=noise)
    if loaded.base_logprobs is not None:
        noise = _mean(np.concatenate(loaded.base_logprobs) - probe.reference)
    difference = np.concatenate(loaded.logprobs) - probe.expected
    mean, limit = _mean(difference), _limit(noise, probe.effect)
    if not mean <= limit:  # also catches NaN
        raise SyncError(
            f"weights version {version}: log-probs of the probe differ by {mean:.3g} on average "
            f"between the learner and {engine}, more than {limit:.3g}, where the checkpoint's own "
            f"differ by {noise:.3g} and the version changes them by {probe.effect:.3g}: the engine "
            "does not run the learner's weights; run the command again, which goes on from the "
            "last checkpoint, and report it if it comes again"
        )
    return SyncCheck(
        arrived=loaded.arrived.share,
        mean_abs_diff=mean,
        max_abs_diff=float(np.abs(difference).max()),
        noise=noise,
    )


def check_version(engine: str, version: int, confirmed: int) -> None:
    """Raise SyncError unless the engine has confirmed this version."""
    if confirmed != version:
        raise SyncError(
            f"weights version {version}: {engine} confirmed version {confirmed}; run the "
            "command again, which goes on from the last checkpoint"
        )


def _check_arrived(engine: str, version: int, arrived: Arrived) -> None:
    """Raise SyncError where an engine holds too little of the update, or something else."""
    fits = abs(arrived.share - 1) <= 1 - LEAST_ARRIVED
    whole = arrived.weakest >= _LEAST_OF_LAYER and arrived.strongest <= 2 - _LEAST_OF_LAYER
    if fits and whole and isfinite(arrived.share):
        return
    name, share = (
        (arrived.weakest_layer, arrived.weakest)
        if 1 - arrived.weakest >= arrived.strongest - 1
        else (arrived.strongest_layer, arrived.strongest)
    )
    raise SyncError(
        f"weights version {version}: {arrived.share:.1%} of the update is in {engine}'s weights, "
        f"and {share:.1%} in those of {name}. If it merges adapters (cluster.engine.adapters) in "
        "bfloat16, rounding loses updates so small: set cluster.engine.adapters=unmerged and run "
        "again, which goes on from the last checkpoint; otherwise it holds another adapter than "
        "the learner"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a sync moved, and the worst that any engine showed."""

    version: int
    bytes: int
    seconds: float
    effect: float
    checks: Sequence[SyncCheck]

    def metrics(self) -> dict[str, float]:
        """The report as scalar metrics."""
        worst = {
            name: max(getattr(check, name) for check in self.checks)
            for name in ("mean_abs_diff", "max_abs_diff", "noise")
        }
        return {
            "sync/bytes": float(self.bytes),
            "sync/seconds": self.seconds,
            "sync/arrived": min(check.arrived for check in self.checks),
            "sync/effect": self.effect,
        } | {f"sync/{name}": value for name, value in worst.items()}


def sync(
    learner: Learner,
    reference: Reference,
    rollouts: Rollouts,
    probe: Sequence[Response],
    *,
    version: int,
) -> Pending[SyncReport]:
    """Publish ``version`` and have every engine load it; the result is there when all have.

    The first 64 tokens of each probe response are scored by the learner, by the reference and by
    every engine. Engines at work load the version when they are through.

    Raises (from the result):
        SyncError: an engine holds another version afterwards, or disagrees with the learner.
    """
    start = time.perf_counter()
    manifest = learner.publish(version).result()
    short = [_head(response) for response in probe]
    own, evaluating = learner.logprobs(short), reference.evaluate(short)
    sent = Probe(
        responses=short,
        expected=np.concatenate(own.result()),
        reference=np.concatenate([found.reference_logprobs for found in evaluating.result()]),
    )
    loading = rollouts.load_weights(manifest, sent)

    def finish() -> SyncReport:
        checks = loading.result()
        return SyncReport(
            version=version,
            bytes=sum(array.nbytes for array in manifest.tensors.values()),
            seconds=time.perf_counter() - start,
            effect=sent.effect,
            checks=checks,
        )

    return Then(finish)


def _limit(noise: float, effect: float) -> float:
    """Largest mean difference between learner and engine that noise explains."""
    return max(_FLOOR, _NOISE_FACTOR * noise) + _EFFECT_FACTOR * effect


def _mean(difference: FloatArray) -> float:
    return float(np.abs(difference).mean())


def _head(response: Response) -> Response:
    return replace(
        response,
        token_ids=response.token_ids[:_PROBE_TOKENS],
        rollout_logprobs=response.rollout_logprobs[:_PROBE_TOKENS],
    )
