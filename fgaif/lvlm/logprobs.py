"""Token log-probabilities without full-vocabulary float32 logits over all positions."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fgaif.lvlm.families.base import ImageFeatures
from fgaif.lvlm.inputs import EncodedBatch
from fgaif.lvlm.model import base_of, last_hidden

CHUNK = 2048
"""Rows of logits that exist at a time."""


def gather_hidden(hidden: Tensor, positions: Tensor) -> Tensor:
    """Pick hidden states (B, T, D) at ``positions`` (B, T) from ``hidden`` (B, L, D)."""
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def chunked_logprobs(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, temperature: float, chunk: int = CHUNK
) -> Tensor:
    """log softmax(head(hidden) / temperature)[target], (N, D) and (N,) -> (N,) in float32.

    At most ``chunk`` rows of logits exist at a time; with gradients each chunk is recomputed in
    the backward pass, so memory is O(chunk * V) instead of O(N * V).
    """

    def piece(states: Tensor, ids: Tensor) -> Tensor:
        logits = head(states).float() / temperature
        return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)

    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([piece(states, ids) for states, ids in pairs])
    if hidden.shape[0] <= chunk:
        return piece(hidden, targets)
    return torch.cat([checkpoint(piece, s, ids, use_reentrant=False) for s, ids in pairs])


def response_logprobs(
    model: nn.Module, batch: EncodedBatch, *, temperature: float, features: ImageFeatures
) -> Tensor:
    """Log-probabilities (B, T) of the response tokens, zero where ``batch.mask`` is 0.

    ``features`` are the images' of the batch, in order.
    """
    return hidden_logprobs(
        model, last_hidden(model, batch.input_ids, features), batch, temperature=temperature
    )


def hidden_logprobs(
    model: nn.Module, hidden: Tensor, batch: EncodedBatch, *, temperature: float
) -> Tensor:
    """Like ``response_logprobs``, from the last hidden states (B, L, D) of ``batch.input_ids``."""
    mask = batch.mask.bool()
    flat = chunked_logprobs(
        gather_hidden(hidden, batch.positions)[mask],
        base_of(model).lm_head,
        batch.targets[mask],
        temperature=temperature,
    )
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def next_token_logprobs(
    model: nn.Module, input_ids: Tensor, last: Tensor, features: ImageFeatures
) -> Tensor:
    """Log-probabilities (B, V) of the token after each prompt.

    ``input_ids`` (B, L) right-padded, ``last`` (B,) the index of each prompt's last token,
    ``features`` those of the images, in order.
    """
    hidden = last_hidden(model, input_ids, features)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return base_of(model).lm_head(hidden[rows, last]).float().log_softmax(-1)
