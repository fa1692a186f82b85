"""Correction for responses that were sampled by other weights than those being trained.

Where sampling runs ahead of training, or the engine computes its log-probs in other ways than the
learner, the surrogate's expectation is over the wrong distribution. PPO's ratio corrects from the
old to the new policy; the weights here correct from the sampler to the old policy.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fgaif.ppo.advantages import check_padded
from fgaif.ppo.ratio import bounded
from fgaif.types import FloatArray, Response, TrainBatch


def importance_weights(
    old_logprobs: FloatArray, rollout_logprobs: FloatArray, mask: FloatArray, *, cap: float
) -> FloatArray:
    """Truncated importance weights per token.

        w_t = min(exp(old_logprobs_t - rollout_logprobs_t), cap)

    Both log-probs are of the distribution that was sampled from, temperature included. The weights
    are constants of the loss: no gradient flows through them. Truncation bounds the variance at the
    price of a bias (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"; token-level truncation in verl's rollout correction, where 2 is the usual cap).

    Args:
        old_logprobs: (B, T), the learner's before the update.
        rollout_logprobs: (B, T), the engine's when it sampled.
        mask: (B, T), 1 on a response's tokens, then 0.
        cap: largest weight.

    Returns:
        (B, T) float32, zero at padding, 1 where the engine gave no finite log-prob.
    """
    check_padded(mask, old_logprobs, rollout_logprobs)
    known = (mask > 0) & np.isfinite(rollout_logprobs)
    gap = np.subtract(old_logprobs, rollout_logprobs, out=np.zeros_like(mask), where=known)
    return np.where(mask > 0, np.minimum(np.exp(bounded(gap)), cap), 0.0).astype(np.float32)


def drop_stale(
    responses: Sequence[Response], step: int, max_staleness: int
) -> tuple[list[int], int]:
    """Find the responses fresh enough for the update after ``step`` finished ones.

    Returns:
        indexes of those sampled with weights at most ``max_staleness`` updates older than the
        learner's, in order, and the number of others.
    """
    kept = [
        index
        for index, response in enumerate(responses)
        if step - response.policy_version <= max_staleness
    ]
    return kept, len(responses) - len(kept)


def drop_alone(responses: Sequence[Response]) -> tuple[list[Response], int]:
    """Find the responses with others to the same prompt, and the number of those without."""
    counts = Counter(response.prompt.id for response in responses)
    kept = [response for response in responses if counts[response.prompt.id] > 1]
    return kept, len(responses) - len(kept)


def off_policy_metrics(batch: TrainBatch, *, step: int, tis_cap: float) -> dict[str, float]:
    """How far the batch is from the policy at ``step``: age of its weights, importance weights.

    ``staleness/*`` is over responses, in updates; ``tis/*`` over tokens, where there are weights.
    """
    ages = [step - response.policy_version for response in batch.responses]
    metrics = {"staleness/mean": float(np.mean(ages)), "staleness/max": float(max(ages))}
    if batch.weights is None:
        return metrics
    weights = batch.weights[batch.mask > 0].astype(np.float64)
    return metrics | {
        "tis/mean_weight": float(weights.mean()),
        "tis/capped_frac": float((weights >= np.float32(tis_cap)).mean()),
    }
