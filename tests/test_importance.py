"""Importance weights from sampler to learner: by hand, in the loss, in expectation; stale drops."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fgaif.ppo.batch import make_batch
from fgaif.ppo.importance import drop_stale, importance_weights, off_policy_metrics
from fgaif.ppo.losses import policy_loss
from fgaif.types import Evaluation, ImageRef, Prompt, Response, TrainBatch

PROMPT = Prompt(id="p", image=ImageRef(path="x.png", sha256="0"), text="Describe.")


def f32(values):
    return np.array(values, dtype=np.float32)


def response(rollout_logprobs, version: int = 0) -> Response:
    return Response(
        prompt=PROMPT, sample=0, text="", token_ids=np.arange(len(rollout_logprobs)),
        rollout_logprobs=f32(rollout_logprobs), finish="stop", policy_version=version,
    )  # fmt: skip


def batch(tis_cap: float | None) -> TrainBatch:
    """Old log-probs ln (0.5, 0.5 | 0.9), sampled with ln (0.25, 0.1 | 1.0) by versions 3 and 5."""
    old = [np.log(f32([0.5, 0.5])), np.log(f32([0.9]))]
    return make_batch(
        [response(np.log([0.25, 0.1]), 3), response(np.log([1.0]), 5)],
        old,
        [Evaluation(reference_logprobs=row, values=np.zeros_like(row)) for row in old],
        [np.ones_like(row) for row in old],
        kl_coef=0.0, gamma=1.0, lam=1.0, tis_cap=tis_cap,
    )  # fmt: skip


def test_weights_by_hand():
    """Ratios 0.5 / 0.25 = 2, 0.5 / 0.1 = 5 cut at 3, 0.9 / 1; nothing at padding."""
    weights = batch(3.0).weights
    assert weights is not None
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [[2.0, 3.0], [0.9, 0.0]], rtol=1e-6)


def test_without_a_cap_there_are_none_and_nothing_else_changes():
    plain, corrected = batch(None), batch(2.0)
    assert plain.weights is None
    for name in ("mask", "old_logprobs", "rewards", "advantages", "returns"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(corrected, name))


@pytest.mark.filterwarnings("error")
def test_unknown_and_extreme_logprobs_give_finite_weights():
    old = f32([[-1.0, -1.0, -500.0, -1.0, np.nan]])
    rollout = f32([[np.nan, -np.inf, -1.0, -500.0, np.nan]])
    weights = importance_weights(old, rollout, f32([[1, 1, 1, 1, 0]]), cap=2.0)
    np.testing.assert_allclose(weights, [[1.0, 1.0, 0.0, 2.0, 0.0]], atol=1e-8)


def test_the_loss_weighs_tokens_and_passes_no_gradient_to_the_weights():
    """Ratio 1, A (3, -4), w (2, 0.5): loss (-6 + 2) / 2, gradient w * -A / 2."""
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    weights = torch.tensor([[2.0, 0.5]], requires_grad=True)
    old, gain, mask = logprobs.detach(), torch.tensor([[3.0, -4.0]]), torch.ones(1, 2)
    loss = policy_loss(
        logprobs, old, gain, mask, clip=0.2, num_valid_tokens=2, weights=weights
    )  # fmt: skip
    loss.backward()
    assert loss.item() == -2.0
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-3.0, 1.0]]))
    assert weights.grad is None


def test_weights_of_one_and_none_give_the_same_bits():
    torch.manual_seed(0)
    logprobs, old, gain = torch.randn(3, 4, 6)
    mask = (torch.arange(6) < torch.tensor([[6], [1], [3], [5]])).float()
    plain, ones = (
        policy_loss(logprobs, old, gain, mask, clip=0.2, num_valid_tokens=15.0, weights=weights)
        for weights in (None, torch.where(mask > 0, torch.ones(4, 6), torch.nan))
    )
    assert plain.item() == ones.item()


def test_in_expectation_the_weights_undo_the_sampler_s_mismatch():
    """The gradient over all tokens of the sampler's distribution is that of the policy's.

    Enumerated, so exact: E_q[(p / q) A grad log p] = E_p[A grad log p]; unweighted it differs.
    """
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64)
    sampler = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    gain = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    policy = logits.log_softmax(0)

    def gradient(drawn_with: torch.Tensor, weighted: bool) -> torch.Tensor:
        free = logits.clone().requires_grad_()
        weights = drawn_with[None]
        if weighted:
            found = importance_weights(
                policy[None].numpy(), sampler.log()[None].numpy(), np.ones((1, 3)), cap=10.0
            )
            weights = weights * torch.from_numpy(found)
        policy_loss(free.log_softmax(0)[None], policy[None], gain, torch.ones(1, 3),
                    clip=0.2, num_valid_tokens=1, weights=weights).backward()  # fmt: skip
        assert free.grad is not None
        return free.grad

    wanted = gradient(policy.exp(), weighted=False)
    torch.testing.assert_close(gradient(sampler, weighted=True), wanted, rtol=1e-6, atol=1e-7)
    assert (gradient(sampler, weighted=False) - wanted).abs().max() > 0.1


def test_metrics_by_hand():
    """At step 5 the versions 3 and 5 are 2 and 0 old; one of three weights is at the cap."""
    metrics = off_policy_metrics(batch(3.0), step=5, tis_cap=3.0)
    assert metrics["staleness/mean"] == 1.0
    assert metrics["staleness/max"] == 2.0
    assert metrics["tis/mean_weight"] == pytest.approx((2.0 + 3.0 + 0.9) / 3)
    assert metrics["tis/capped_frac"] == pytest.approx(1 / 3)
    assert set(off_policy_metrics(batch(None), step=5, tis_cap=3.0)) == {
        "staleness/mean", "staleness/max",
    }  # fmt: skip


def test_stale_responses_are_dropped_and_counted():
    responses = [replace(response([-1.0]), policy_version=version) for version in (4, 1, 3, 2)]
    assert drop_stale(responses, step=4, max_staleness=2) == ([0, 2, 3], 1)
    assert drop_stale(responses, step=4, max_staleness=0) == ([0], 3)
    assert drop_stale(responses, step=9, max_staleness=2) == ([], 4)
