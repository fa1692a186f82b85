"""The KL estimate from samples, the KL coefficient's controller, and the engine mismatch."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from fgaif.config import KlConfig
from fgaif.ppo.advantages import check_padded
from fgaif.ppo.ratio import bounded
from fgaif.types import FloatArray

_MAX_ERROR = 0.2


def kl_k1(logprobs: FloatArray, reference_logprobs: FloatArray, mask: FloatArray) -> FloatArray:
    """Estimate KL(policy || reference) per sampled token: log pi - log pi_ref, (B, T).

    Unbiased, may be negative; this is what the reward subtracts. Zero at padding.
    """
    check_padded(mask, logprobs, reference_logprobs)
    return np.where(mask > 0, logprobs - reference_logprobs, 0.0).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class KlState:
    """The KL coefficient in use."""

    coef: float

    @classmethod
    def from_config(cls, config: KlConfig) -> Self:
        """Start from the configured coefficient."""
        return cls(coef=config.coef)


def update_kl(state: KlState, observed: float, responses: int, config: KlConfig) -> KlState:
    """Steer the coefficient towards ``config.target``; without a target it stays as it is.

        coef <- coef (1 + clamp(observed / target - 1, -0.2, 0.2) responses / horizon)

    Args:
        state: coefficient used in this step.
        observed: KL summed over a response's tokens, mean over responses.
        responses: number of responses in this step.
        config: target and horizon (in responses).
    """
    if config.target is None:
        return state
    error = float(np.clip(observed / config.target - 1.0, -_MAX_ERROR, _MAX_ERROR))
    return KlState(coef=state.coef * (1.0 + error * responses / config.horizon))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """How far the rollout engine's log-probs are from the learner's, over valid tokens.

    ``mean_dp`` is the mean of abs(p_rollout - p_learner), ``max_dlogp`` the largest difference of
    log-probs, ``kl`` the k3 estimate of KL(rollout || learner), of bounded differences; ``missing``
    counts tokens without a finite rollout log-prob, which the other figures leave out.
    """

    mean_dp: float
    max_dlogp: float
    kl: float
    missing: int


def mismatch(
    rollout_logprobs: FloatArray, learner_logprobs: FloatArray, mask: FloatArray
) -> Mismatch:
    """Compare the two sources of log-probs of the same sampled tokens, all (B, T)."""
    check_padded(mask, rollout_logprobs, learner_logprobs)
    finite = np.isfinite(rollout_logprobs) & (mask > 0)
    rollout = rollout_logprobs[finite].astype(np.float64)
    learner = learner_logprobs[finite].astype(np.float64)
    missing = int(mask.sum()) - rollout.size
    if rollout.size == 0:
        return Mismatch(mean_dp=0.0, max_dlogp=0.0, kl=0.0, missing=missing)
    difference = learner - rollout
    near = bounded(difference)
    return Mismatch(
        mean_dp=float(np.abs(np.exp(learner) - np.exp(rollout)).mean()),
        max_dlogp=float(np.abs(difference).max()),
        kl=float((np.expm1(near) - near).mean()),
        missing=missing,
    )
