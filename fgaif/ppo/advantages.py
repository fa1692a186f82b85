"""Advantages and returns over padded responses: pure functions of arrays."""

import numpy as np

from fgaif.types import FloatArray


def gae(
    rewards: FloatArray, values: FloatArray, mask: FloatArray, *, gamma: float, lam: float
) -> tuple[FloatArray, FloatArray]:
    """Compute generalised advantage estimates and returns.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        returns = A + V

    V and A after a response's last token are 0. ``values[t]`` is V of the prefix before token t.

    Args:
        rewards: (B, T); what padding holds is ignored.
        values: (B, T), likewise.
        mask: (B, T), 1 on a response's tokens, which come first, and 0 on padding.
        gamma: discount in (0, 1].
        lam: 1 gives Monte Carlo returns minus V, 0 gives one-step TD errors.

    Returns:
        advantages, returns: (B, T) float32, zero at padding.
    """
    check_padded(mask, rewards, values)
    valid = mask > 0
    reward = np.where(valid, rewards, 0.0).astype(np.float64)
    value = np.where(valid, values, 0.0).astype(np.float64)
    advantages = np.zeros_like(reward)
    next_value = next_advantage = np.zeros(mask.shape[0])
    for t in reversed(range(mask.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        # Padding comes last, so the recursion carries zeros until it meets the last token.
        next_advantage = np.where(valid[:, t], delta + gamma * lam * next_advantage, 0.0)
        advantages[:, t] = next_advantage
        next_value = value[:, t]
    return advantages.astype(np.float32), (advantages + value).astype(np.float32)


def whiten(x: FloatArray, mask: FloatArray, *, eps: float = 1e-8) -> FloatArray:
    """Shift and scale ``x`` (B, T) to mean 0 and (biased) deviation 1 over valid tokens.

    (x - mean) / (std + eps), zero at padding; a constant ``x`` gives zeros.
    """
    check_padded(mask, x)
    valid = mask > 0
    if not valid.any():
        return np.zeros_like(x)
    flat = x[valid].astype(np.float64)
    scaled = np.zeros(x.shape, dtype=np.float32)
    scaled[valid] = (flat - flat.mean()) / (flat.std() + eps)
    return scaled


def explained_variance(values: FloatArray, returns: FloatArray, mask: FloatArray) -> float:
    """Share of the returns' variance that the values explain: 1 - Var(R - V) / Var(R).

    All (B, T), over valid tokens. 1 is perfect, 0 is no better than the mean; NaN if the returns
    are constant.
    """
    check_padded(mask, values, returns)
    valid = mask > 0
    target = returns[valid].astype(np.float64)
    variance = target.var() if target.size else 0.0
    if variance == 0.0:
        return float("nan")
    return float(1.0 - (target - values[valid]).var() / variance)


def check_padded(mask: FloatArray, *arrays: FloatArray) -> None:
    """Raise ValueError unless all are (B, T) alike and the mask is ones, then zeros, per row."""
    for array in (mask, *arrays):
        if array.ndim != 2 or array.shape != mask.shape:
            raise ValueError(
                f"expected (B, T) arrays of one shape, got {array.shape}, {mask.shape}"
            )
    if not np.isin(mask, (0, 1)).all() or (np.diff(mask, axis=1) > 0).any():
        raise ValueError("mask rows must be ones followed by zeros")
