"""Token log-probabilities without full-vocabulary float32 logits over all positions."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fgaif.lvlm.inputs import EncodedBatch
from fgaif.lvlm.model import base_of, image_features, last_hidden

_CHUNK = 2048


def gather_hidden(hidden: Tensor, positions: Tensor) -> Tensor:
    """Pick hidden states (B, T, D) at ``positions`` (B, T) from ``hidden`` (B, L, D)."""
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def chunked_logprobs(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, temperature: float, chunk: int = _CHUNK
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


def response_logprobs(model: nn.Module, batch: EncodedBatch, *, temperature: float) -> Tensor:
    """Log-probabilities (B, T) of the response tokens, zero where ``batch.mask`` is 0."""
    features = image_features(model, batch.pixel_values)
    hidden = last_hidden(model, batch.input_ids, features)
    mask = batch.mask.bool()
    flat = chunked_logprobs(
        gather_hidden(hidden, batch.positions)[mask],
        base_of(model).lm_head,
        batch.targets[mask],
        temperature=temperature,
    )
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def next_token_logprobs(
    model: nn.Module, input_ids: Tensor, last: Tensor, pixel_values: Tensor
) -> Tensor:
    """Log-probabilities (B, V) of the token after each prompt; ``last`` (B,) ends the prompts."""
    features = image_features(model, pixel_values)
    hidden = last_hidden(model, input_ids, features)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return base_of(model).lm_head(hidden[rows, last]).float().log_softmax(-1)
