"""GAE, whitening and explained variance by hand-computable numbers."""

import numpy as np
import pytest

from fgaif.ppo.advantages import explained_variance, gae, whiten


def f32(rows):
    return np.array(rows, dtype=np.float32)


def test_gae_by_hand():
    """gamma 1, lam 0.5: delta = (1 + 1 - 0.5, 2 - 1) = (1.5, 1); A = (1.5 + 0.5, 1)."""
    advantages, returns = gae(f32([[1, 2]]), f32([[0.5, 1]]), f32([[1, 1]]), gamma=1.0, lam=0.5)
    np.testing.assert_allclose(advantages, [[2.0, 1.0]])
    np.testing.assert_allclose(returns, [[2.5, 2.0]])


def test_gae_discounts_the_next_value_and_advantage():
    """gamma 0.5, lam 0.5: delta = (1 + 0.5 - 0.5, 1); A_0 = 1 + 0.25 * 1."""
    advantages, _ = gae(f32([[1, 2]]), f32([[0.5, 1]]), f32([[1, 1]]), gamma=0.5, lam=0.5)
    np.testing.assert_allclose(advantages, [[1.25, 1.0]])


def test_lambda_one_is_monte_carlo():
    rewards, values = f32([[1, 0, -1, 3]]), f32([[0.3, -2, 5, 1]])
    _, returns = gae(rewards, values, np.ones_like(rewards), gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, [[3, 2, 2, 3]], rtol=1e-6)


def test_lambda_zero_is_one_step_td():
    rewards, values = f32([[1, 0, -1]]), f32([[0.5, 2, 4]])
    advantages, _ = gae(rewards, values, np.ones_like(rewards), gamma=0.5, lam=0.0)
    np.testing.assert_allclose(advantages, [[1 + 1 - 0.5, 0 + 2 - 2, -1 - 4]])


def test_reward_free_tokens_between_segments_do_not_end_the_episode():
    rewards = f32([[0, 1, 0, 0, 1]])
    _, returns = gae(rewards, np.zeros_like(rewards), np.ones_like(rewards), gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, [[2, 2, 1, 1, 1]])


@pytest.mark.parametrize("garbage", [7.0, np.nan, np.inf])
def test_padding_never_leaks(garbage):
    rewards, values, mask = f32([[1, 2, 0]]), f32([[0.5, 1, 0]]), f32([[1, 1, 0]])
    rewards[:, 2] = values[:, 2] = garbage
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    np.testing.assert_array_equal(advantages, [[2.0, 1.0, 0.0]])
    np.testing.assert_array_equal(returns, [[2.5, 2.0, 0.0]])


def test_rows_are_independent():
    rewards, values = f32([[1, 2], [5, 6]]), f32([[0.5, 1], [2, 2]])
    mask = f32([[1, 1], [1, 0]])
    together, _ = gae(rewards, values, mask, gamma=1.0, lam=0.9)
    alone, _ = gae(rewards[1:, :1], values[1:, :1], mask[1:, :1], gamma=1.0, lam=0.9)
    np.testing.assert_array_equal(together[1, :1], alone[0])


def test_mask_must_be_right_padded_and_shapes_equal():
    with pytest.raises(ValueError, match="ones followed by zeros"):
        gae(f32([[1, 1]]), f32([[1, 1]]), f32([[0, 1]]), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="one shape"):
        gae(f32([[1, 1]]), f32([[1]]), f32([[1, 1]]), gamma=1.0, lam=1.0)


def test_whiten_uses_valid_tokens_only():
    """Valid (1, 3): mean 2, deviation 1."""
    whitened = whiten(f32([[1, 3, 100]]), f32([[1, 1, 0]]))
    np.testing.assert_allclose(whitened, [[-1, 1, 0]], atol=1e-6)


def test_whiten_of_a_constant_is_zero():
    np.testing.assert_array_equal(whiten(f32([[0.1, 0.1]]), f32([[1, 1]])), [[0, 0]])
    np.testing.assert_array_equal(whiten(f32([[5, 5]]), f32([[0, 0]])), [[0, 0]])


def test_explained_variance():
    """Returns (0, 2) have variance 1; errors (0, 1) have 0.25."""
    returns, mask = f32([[0, 2, 9]]), f32([[1, 1, 0]])
    assert explained_variance(f32([[0, 1, 0]]), returns, mask) == pytest.approx(0.75)
    assert explained_variance(f32([[0, 2, 0]]), returns, mask) == 1.0
    assert explained_variance(f32([[4, 4, 0]]), returns, mask) == 0.0
    assert np.isnan(explained_variance(f32([[1, 2]]), f32([[3, 3]]), f32([[1, 1]])))
