"""From rollouts to a training batch, and how batches are cut."""

import numpy as np
import pytest

from fgaif.errors import DataError
from fgaif.ppo.batch import make_batch, micro_batches, minibatches
from fgaif.types import Evaluation, ImageRef, Prompt, Response

PROMPT = Prompt(id="p", image=ImageRef(path="x.png", sha256="0"), text="Describe.")


def f32(values):
    return np.array(values, dtype=np.float32)


def response(length, sample=0):
    return Response(
        prompt=PROMPT, sample=sample, text="", token_ids=np.arange(length),
        rollout_logprobs=np.zeros(length, np.float32), finish="stop", policy_version=0,
    )  # fmt: skip


def two_responses(kl_coef=0.1, lam=1.0):
    return make_batch(
        [response(2), response(1, sample=1)],
        [f32([-1.0, -2.0]), f32([-0.5])],
        [
            Evaluation(reference_logprobs=f32([-2.0, -2.0]), values=f32([0.5, 0.25])),
            Evaluation(reference_logprobs=f32([-0.5]), values=f32([0.0])),
        ],
        [f32([0.0, 1.0]), f32([-1.0])],
        kl_coef=kl_coef, gamma=1.0, lam=lam,
    )  # fmt: skip


def test_rewards_subtract_the_kl_term():
    """log pi - log pi_ref = (1, 0): the first token pays 0.1; the opposite sign would earn it."""
    batch = two_responses()
    np.testing.assert_allclose(batch.rewards, [[-0.1, 1.0], [-1.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(batch.task_rewards, [[0.0, 1.0], [-1.0, 0.0]])
    wrong_sign = two_responses(kl_coef=-0.1)
    assert wrong_sign.rewards[0, 0] == pytest.approx(0.1)
    assert batch.returns[0, 0] < wrong_sign.returns[0, 0]


def test_returns_and_whitened_advantages():
    """Returns (0.9, 1 | -1); advantages (0.4, 0.75 | -1): mean 0.05 before whitening."""
    batch = two_responses()
    np.testing.assert_allclose(batch.returns, [[0.9, 1.0], [-1.0, 0.0]], rtol=1e-6)
    raw = np.array([0.4, 0.75, -1.0])
    expected = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(batch.advantages[batch.mask > 0], expected, rtol=1e-5)
    assert batch.advantages[1, 1] == 0.0
    np.testing.assert_array_equal(batch.mask, [[1, 1], [1, 0]])


def test_a_wrong_length_names_the_response():
    with pytest.raises(DataError, match=r"p#3: task_rewards \(1,\) for 2 tokens"):
        make_batch(
            [response(2, sample=3)], [f32([0, 0])],
            [Evaluation(reference_logprobs=f32([0, 0]), values=f32([0, 0]))], [f32([0])],
            kl_coef=0.0, gamma=1.0, lam=1.0,
        )  # fmt: skip
    with pytest.raises(DataError, match="as many"):
        make_batch([response(1)], [], [], [], kl_coef=0.0, gamma=1.0, lam=1.0)


def test_minibatches_are_a_seeded_partition():
    cut = list(minibatches(10, 4, (1, 2, 3)))
    assert [len(part) for part in cut] == [4, 3, 3]
    assert sorted(np.concatenate(cut)) == list(range(10))
    np.testing.assert_array_equal(
        np.concatenate(cut), np.concatenate([*minibatches(10, 4, (1, 2, 3))])
    )
    assert np.concatenate(cut).tolist() != np.concatenate([*minibatches(10, 4, (1, 2, 4))]).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches_of_all_ranks_cover_the_minibatch_once(world_size):
    indexes, lengths = np.array([5, 0, 3, 1, 4]), np.array([3, 9, 1, 7, 2, 5])
    shares = [
        micro_batches(indexes, lengths, size=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shapes = {tuple(len(rows) for rows, _ in share) for share in shares}
    assert len(shapes) == 1, "ranks must run the same number of passes"
    counted = [row for share in shares for rows, weights in share for row in rows[weights > 0]]
    assert sorted(counted) == sorted(indexes)


def test_micro_batches_put_like_lengths_together():
    lengths = np.array([1, 50, 2, 60])
    (long, _), (short, _) = micro_batches(np.arange(4), lengths, size=2)
    assert lengths[long].tolist() == [60, 50]
    assert lengths[short].tolist() == [2, 1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_of_few_tokens_count_padding(world_size):
    """Rows times the longest one stay within the limit, on every rank in the same places."""
    lengths = np.array([90, 10, 40, 39, 41, 9, 8, 42, 7])
    shares = [
        micro_batches(np.arange(9), lengths, size=4, tokens=84, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for share in shares:
        for rows, _ in share:
            assert len(rows) == 1 or len(rows) * lengths[rows].max() <= 84
            assert len(rows) <= 4
    assert len({tuple(len(rows) for rows, _ in share) for share in shares}) == 1
    counted = [row for share in shares for rows, weights in share for row in rows[weights > 0]]
    assert sorted(counted) == list(range(9))
    if world_size == 1:
        pieces = [lengths[rows].tolist() for rows, _ in shares[0]]
        assert pieces == [[90], [42, 41], [40, 39], [10, 9, 8, 7]]


def test_no_minibatch_is_a_left_over() -> None:
    """A single response would get a whole step of Adam; full minibatches are cut as they were."""
    assert [len(rows) for rows in minibatches(9, 4, (1,))] == [3, 3, 3]
    assert [len(rows) for rows in minibatches(257, 256, (1,))] == [129, 128]
    order = np.concatenate([*minibatches(8, 4, (1,))])
    np.testing.assert_array_equal([*minibatches(8, 4, (1,))], order.reshape(2, 4))
