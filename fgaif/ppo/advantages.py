"""Advantages over padded responses: one pure function of arrays for each estimator.

``gae`` needs a critic's values. The others do without: ``reinforce`` takes the rest of the reward,
``grpo``, ``rloo`` and ``token_grpo`` compare a response with others to the same prompt.
"""

import numpy as np
from numpy.typing import NDArray

from fgaif.errors import DataError
from fgaif.types import FloatArray, IntArray

_GROUP_EPS = 1e-6


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


def reinforce(rewards: FloatArray, mask: FloatArray, *, gamma: float) -> FloatArray:
    """Compute the discounted reward from each token on.

        A_t = sum_{s >= t} gamma^(s - t) r_s

    Williams 1992. Whitened over the batch, as ``make_batch`` does, it is REINFORCE++ (Hu et al.
    2025, arXiv 2501.03262): the batch's mean is the baseline, and there is no critic. All (B, T).
    """
    check_padded(mask, rewards)
    rest = np.where(mask > 0, rewards, 0.0).astype(np.float64)
    for t in reversed(range(mask.shape[1] - 1)):
        rest[:, t] += gamma * rest[:, t + 1]
    return np.where(mask > 0, rest, 0.0).astype(np.float32)


def grpo(rewards: FloatArray, groups: IntArray, mask: FloatArray) -> FloatArray:
    """Compute the group-relative advantage, the same at every token of a response.

        R_i = sum_t r_{i,t};   A_{i,t} = (R_i - mean R) / (std R + 1e-6)

    with mean and (unbiased) deviation over the responses of i's group; where all rewards of a group
    are equal the advantage is 0. Shao et al. 2024, arXiv 2402.03300, outcome supervision; deviation
    and epsilon as in verl.

    Args:
        rewards: (B, T).
        groups: (B,), equal for responses to the same prompt.
        mask: (B, T), 1 on a response's tokens, then 0.

    Raises:
        DataError: a group has one response only.
    """
    total, members = _group_totals(rewards, groups, mask)
    mean = members @ total / members.sum(1)
    apart = total - mean
    deviation = np.sqrt(members @ apart**2 / (members.sum(1) - 1))
    return _on_tokens(apart / (deviation + _GROUP_EPS), mask)


def rloo(rewards: FloatArray, groups: IntArray, mask: FloatArray) -> FloatArray:
    """Compute the reward beyond the mean of the others in the group, alike at every token.

        R_i = sum_t r_{i,t};   A_{i,t} = R_i - sum_{j != i} R_j / (G - 1)

    over the G responses of i's group. Ahmadian et al. 2024, arXiv 2402.14740 (Kool et al. 2019).
    Arguments and errors as for :func:`grpo`.
    """
    total, members = _group_totals(rewards, groups, mask)
    others = members.sum(1) - 1
    return _on_tokens(total - (members @ total - total) / others, mask)


def token_grpo(
    rewards: FloatArray,
    own_rewards: FloatArray,
    groups: IntArray,
    mask: FloatArray,
    *,
    penalty: float,
) -> FloatArray:
    """Compute the group-relative advantage, lowered at the tokens of bad segments.

        A_{i,t} = A^grpo_i - penalty m_{i,t} |A^grpo_i|,   m_{i,t} = 1[own_{i,t} < 0]

    where own_{i,t} is the reward of the segment that token t is of. This is equation 3 of Perceval
    (Min et al. 2026, arXiv 2604.24583; there m marks the spans that its reward model found wrong,
    and penalty is 0.1). It uses the same segments as the method and no critic.

    Args:
        rewards: (B, T).
        own_rewards: (B, T), each token's segment's reward, 0 for tokens of no segment.
        groups, mask: as for :func:`grpo`, which also says what is raised.
        penalty: share of the advantage's size.
    """
    check_padded(mask, own_rewards)
    shared = grpo(rewards, groups, mask)
    bad = (own_rewards < 0) & (mask > 0)
    return (shared - penalty * bad * np.abs(shared)).astype(np.float32)


def _group_totals(
    rewards: FloatArray, groups: IntArray, mask: FloatArray
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reward of each response (B,), and who is in whose group (B, B) of ones and zeros."""
    check_padded(mask, rewards)
    if groups.shape != mask.shape[:1]:
        raise ValueError(f"expected groups (B,), got {groups.shape} for {mask.shape}")
    total = np.where(mask > 0, rewards, 0.0).astype(np.float64).sum(axis=1)
    members = (groups[:, None] == groups[None, :]).astype(np.float64)
    if (members.sum(axis=1) < 2).any():
        alone = int((members.sum(axis=1) < 2).argmax())
        raise DataError(
            f"response {alone} is the only one to its prompt, so there is no group to compare it "
            "with: ppo.samples_per_prompt must be 2 or more for this estimator"
        )
    return total, members


def _on_tokens(per_response: NDArray[np.float64], mask: FloatArray) -> FloatArray:
    """(B,) to (B, T), zero at padding."""
    return np.where(mask > 0, per_response[:, None], 0.0).astype(np.float32)


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
