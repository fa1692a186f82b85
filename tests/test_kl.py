"""KL estimators, the coefficient's controller, and the engine mismatch."""

import numpy as np
import pytest

from fgaif.config import KlConfig
from fgaif.ppo.kl import KlState, kl_k1, mismatch, update_kl


def f32(rows):
    return np.array(rows, dtype=np.float32)


def test_k1_is_positive_where_the_policy_likes_its_token_more():
    k1 = kl_k1(f32([[-1, -2, 9]]), f32([[-1.5, -1, -9]]), f32([[1, 1, 0]]))
    np.testing.assert_allclose(k1, [[0.5, -1.0, 0.0]])


def test_k1_is_unbiased_in_expectation_over_the_policy():
    """sum_v p(v) k(v) equals KL(p || q)."""
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.4, 0.4, 0.2])
    exact = float((p * np.log(p / q)).sum())
    rows = f32([np.log(p)]), f32([np.log(q)]), np.ones((1, 3), np.float32)
    assert float((p * kl_k1(*rows)).sum()) == pytest.approx(exact, rel=1e-5)


def test_fixed_coefficient_stays():
    config = KlConfig(coef=0.1)
    state = KlState.from_config(config)
    assert update_kl(state, 50.0, 64, config) == state


def test_adaptive_coefficient_by_hand():
    """KL 10 % above the target, 100 of 1000 responses: times 1.01; the error is cut at 20 %."""
    config = KlConfig(coef=0.1, target=5.0, horizon=1000)
    state = KlState.from_config(config)
    assert update_kl(state, 5.5, 100, config).coef == pytest.approx(0.101)
    assert update_kl(state, 500.0, 100, config).coef == pytest.approx(0.102)
    assert update_kl(state, 0.0, 100, config).coef == pytest.approx(0.098)
    assert update_kl(state, 5.0, 100, config) == state


def test_mismatch_by_hand():
    """p (0.5, 0.5) against (0.5, 0.4), the third token has no rollout log-prob, the fourth pads."""
    rollout = f32([[np.log(0.5), np.log(0.5), np.nan, np.nan]])
    learner = f32([[np.log(0.5), np.log(0.4), -1, 0]])
    result = mismatch(rollout, learner, f32([[1, 1, 1, 0]]))
    assert result.mean_dp == pytest.approx(0.05, rel=1e-5)
    assert result.max_dlogp == pytest.approx(np.log(1.25), rel=1e-5)
    assert result.kl == pytest.approx((0.8 - 1 + np.log(1.25)) / 2, rel=1e-4)
    assert result.missing == 1


def test_mismatch_of_equal_logprobs_is_zero():
    same = f32([[-1, -2]])
    result = mismatch(same, same, f32([[1, 1]]))
    assert (result.mean_dp, result.max_dlogp, result.kl, result.missing) == (0.0, 0.0, 0.0, 0)


@pytest.mark.filterwarnings("error")
def test_mismatch_of_far_logprobs_is_finite():
    """The learner's p is 1/e; where the engine's is e^-1001, d = 1000 counts as 20, the KL's bound.

    exp(1000) overflows in float64 too. The other way round exp(-20) - 1 + 20 is 19.
    """
    near, far = f32([[-1.0, -1.0]]), f32([[-1.0, -1001.0]])
    ones = f32([[1, 1]])
    for result, kl in (
        (mismatch(far, near, ones), np.exp(20.0) - 21),
        (mismatch(near, far, ones), 19),
    ):
        assert result.kl == pytest.approx(kl / 2, rel=1e-6)
        assert result.max_dlogp == 1000
        assert result.mean_dp == pytest.approx(np.exp(-1) / 2, rel=1e-6)
        assert result.missing == 0
