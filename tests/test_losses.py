"""PPO losses by hand-computable numbers, and their independence of padding and cuts."""

import math

import pytest
import torch

from fgaif.ppo.losses import (
    anchor_kl,
    clipped_tokens,
    kl_loss,
    log_ratio,
    policy_loss,
    value_loss,
)


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


ONES = row(1.0, 1.0)


def test_policy_loss_by_hand():
    """Ratios (1.5, 0.5), A (1, -1), clip 0.2.

    Token 0: max(-1.5, -1.2) = -1.2. Token 1: max(0.5, 0.8) = 0.8. Mean -0.2.
    """
    logprobs = row(math.log(1.5), math.log(0.5))
    loss = policy_loss(logprobs, row(0, 0), row(1, -1), ONES, clip=0.2, num_valid_tokens=2)
    assert loss.item() == pytest.approx(-0.2)


def test_policy_gradient_is_minus_advantage_at_ratio_one():
    logprobs = row(-1.0, -2.0).requires_grad_()
    old = logprobs.detach()
    policy_loss(logprobs, old, row(3, -4), ONES, clip=0.2, num_valid_tokens=2).backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, row(-1.5, 2.0))


def test_clipping_removes_the_gradient_only_where_it_would_go_further():
    """Ratio 1.5 with A > 0 is clipped, the same ratio with A < 0 is pulled back."""
    logprobs = row(math.log(1.5), math.log(1.5)).requires_grad_()
    policy_loss(logprobs, row(0, 0), row(1, -1), ONES, clip=0.2, num_valid_tokens=1).backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, row(0.0, 1.5))
    assert clipped_tokens(logprobs, row(0, 0), row(1, -1), ONES, clip=0.2).item() == 1


@pytest.mark.parametrize("garbage", [5.0, float("nan"), float("inf")])
def test_padding_touches_neither_loss_nor_gradient(garbage):
    mask = row(1, 0)
    logprobs = row(-1.0, garbage).requires_grad_()
    old, advantages = row(-1.1, garbage), row(2.0, garbage)
    loss = policy_loss(logprobs, old, advantages, mask, clip=0.2, num_valid_tokens=1)
    loss.backward()
    alone = policy_loss(row(-1.0), row(-1.1), row(2.0), row(1.0), clip=0.2, num_valid_tokens=1)
    assert loss.item() == alone.item()
    assert logprobs.grad is not None
    assert logprobs.grad[0, 1].item() == 0.0
    assert logprobs.grad.isfinite().all()
    value = value_loss(row(1.0, garbage), row(1.0, garbage), row(3.0, garbage), mask,
                       clip=0.2, num_valid_tokens=1)  # fmt: skip
    assert value.item() == 2.0
    assert clipped_tokens(logprobs, old, advantages, mask, clip=0.2).item() == 0


def test_pieces_of_a_minibatch_add_up():
    torch.manual_seed(0)
    logprobs, old, advantages = torch.randn(3, 4, 6)
    mask = (torch.arange(6) < torch.tensor([[6], [1], [3], [5]])).float()
    count = mask.sum().item()
    whole = policy_loss(logprobs, old, advantages, mask, clip=0.2, num_valid_tokens=count)
    pieces = sum(
        policy_loss(logprobs[rows], old[rows], advantages[rows], mask[rows],
                    clip=0.2, num_valid_tokens=count)
        for rows in ([2], [0, 3], [1])
    )  # fmt: skip
    torch.testing.assert_close(whole, pieces)


def test_value_loss_by_hand():
    """V 2, V_old 1, R 3, clip 0.5: near = 1.5, max(1, 2.25) / 2; unclipped 1 / 2."""
    arguments = row(2.0), row(1.0), row(3.0), row(1.0)
    assert value_loss(*arguments, clip=0.5, num_valid_tokens=1).item() == 1.125
    assert value_loss(*arguments, clip=None, num_valid_tokens=1).item() == 0.5


def test_kl_loss_by_hand():
    """d = log 2 and log 1/2, so k3 = 2 - log 2 - 1 and 1/2 + log 2 - 1; of four tokens."""
    policy = torch.tensor([[-1.0, -1.0, float("nan")]], requires_grad=True)
    apart = torch.tensor([[0.5, 2.0, 7.0]]).reciprocal().log()
    loss = kl_loss(policy, policy.detach() + apart, torch.tensor([[1.0, 1, 0]]), num_valid_tokens=4)
    assert loss.item() == pytest.approx(((2 - math.log(2) - 1) + (0.5 + math.log(2) - 1)) / 4)
    loss.backward()
    # The derivative of exp(d) - d - 1 by the policy is 1 - exp(d).
    assert policy.grad.tolist() == [pytest.approx([-0.25, 0.125, 0.0])]


def test_kl_loss_is_never_negative_and_zero_at_the_reference():
    same = torch.tensor([[-1.0, -3.0]])
    mask = torch.ones(1, 2)
    assert kl_loss(same, same, mask, num_valid_tokens=2).item() == 0
    for shift in (-2.0, 2.0):
        assert kl_loss(same, same + shift, mask, num_valid_tokens=2).item() > 0


def test_anchor_kl_by_hand():
    """p_ref (0.5, 0.5), p (0.25, 0.75): 0.5 ln 2 + 0.5 ln(2/3); equal distributions give 0."""
    reference, policy = row(0.5, 0.5).log(), row(0.25, 0.75).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert anchor_kl(reference, policy).item() == pytest.approx(expected)
    assert anchor_kl(reference, reference).item() == 0.0


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="one shape"):
        policy_loss(row(1), row(1), row(1), ONES, clip=0.2, num_valid_tokens=1)
    with pytest.raises(ValueError, match="twice"):
        anchor_kl(row(1), row(1, 2))


@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_far_ratios_stay_finite(advantage: float, gap: float) -> None:
    """exp(200) is infinite, and infinity times an advantage of 0 is not a number."""
    old = torch.full((1, 2), -3.0)
    new = (old + gap).requires_grad_()
    mask = torch.ones(1, 2)
    loss = policy_loss(
        new, old, torch.full((1, 2), advantage), mask, clip=0.2, num_valid_tokens=2.0
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert new.grad is not None
    assert torch.isfinite(new.grad).all()
    assert torch.isfinite(log_ratio(new, old, mask).exp()).all()
