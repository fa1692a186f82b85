"""PPO's losses over padded responses: pure functions of tensors.

Each loss is a sum over the tokens of this piece, divided by ``num_valid_tokens`` counted over the
whole minibatch: pieces' losses add up to the minibatch's, however it was cut over ranks and
micro-batches.
"""

import torch
from torch import Tensor

from fgaif.ppo.ratio import bounded


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    num_valid_tokens: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Compute the clipped surrogate loss.

        sum_t w_t max(-A_t rho_t, -A_t clip(rho_t, 1 - clip, 1 + clip)) / num_valid_tokens
        rho_t = exp(logprobs_t - old_logprobs_t), the exponent bounded

    All tensors (B, T); only tokens where ``mask`` is 1 count, whatever the rest holds. ``weights``
    are constant importance weights from the sampler to the old policy, None for ones.
    """
    _check(mask, logprobs, old_logprobs, advantages)
    ratio = log_ratio(logprobs, old_logprobs, mask).exp()
    gain = torch.where(mask > 0, advantages, 0.0)
    loss = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip))
    if weights is not None:
        _check(mask, weights)
        loss = loss * torch.where(mask > 0, weights.detach(), 0.0)
    return loss.sum() / num_valid_tokens


def kl_loss(
    logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, *, num_valid_tokens: float
) -> Tensor:
    """Compute the k3 estimate of KL(policy || reference) as a loss.

        sum_t (exp(d_t) - d_t - 1) / num_valid_tokens,   d_t = reference_logprobs_t - logprobs_t

    with d bounded; all (B, T). Never negative; the term of GRPO (Shao et al. 2024, equation 4;
    Schulman, "Approximating KL divergence").
    """
    apart = log_ratio(reference_logprobs, logprobs, mask)
    return (apart.exp() - apart - 1).sum() / num_valid_tokens


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    num_valid_tokens: float,
) -> Tensor:
    """Compute the squared error of the values, pessimistic about moves beyond ``clip``.

        0.5 sum_t max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2) / num_valid_tokens

    All tensors (B, T). ``clip`` None gives the plain squared error.
    """
    _check(mask, values, old_values, returns)
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * torch.where(mask > 0, error, 0.0).sum() / num_valid_tokens


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """logprobs - old_logprobs, bounded, zero where ``mask`` is 0; all (B, T)."""
    _check(mask, logprobs, old_logprobs)
    # Masked before exp: an infinite value at padding would turn into NaN gradients.
    return bounded(torch.where(mask > 0, logprobs - old_logprobs, 0.0))


def clipped_tokens(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
) -> Tensor:
    """Count the tokens (scalar tensor) whose policy gradient the clipping removes.

    These are the tokens with rho_t > 1 + clip and A_t > 0, or rho_t < 1 - clip and A_t < 0.
    """
    _check(mask, logprobs, old_logprobs, advantages)
    ratio = log_ratio(logprobs, old_logprobs, mask).exp()
    high = (ratio > 1 + clip) & (advantages > 0)
    low = (ratio < 1 - clip) & (advantages < 0)
    return ((high | low) & (mask > 0)).sum()


def anchor_kl(reference_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """KL(reference || policy) of whole distributions: (N, V) log-probs each -> (N,).

    sum_v p_ref(v) (log p_ref(v) - log p(v))
    """
    if reference_logprobs.ndim != 2 or reference_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"expected (N, V) twice, got {tuple(reference_logprobs.shape)} and "
            f"{tuple(logprobs.shape)}"
        )
    return (reference_logprobs.exp() * (reference_logprobs - logprobs)).sum(-1)


def _check(mask: Tensor, *tensors: Tensor) -> None:
    for tensor in (mask, *tensors):
        if tensor.ndim != 2 or tensor.shape != mask.shape:
            raise ValueError(
                f"expected (B, T) tensors of one shape, got {tuple(tensor.shape)} and "
                f"mask {tuple(mask.shape)}"
            )
