"""Data order and seeds depend on the step alone."""

import numpy as np
import pytest

from fgaif.data.order import batch_indexes, draw, request_seed


def test_each_epoch_shows_every_prompt_once_across_step_borders() -> None:
    seen = [index for step in range(6) for index in batch_indexes(9, 6, step, seed=1)]
    for epoch in range(4):
        assert sorted(seen[epoch * 9 : epoch * 9 + 9]) == list(range(9))
    assert seen[:9] != seen[9:18]


def test_a_step_can_be_made_without_the_steps_before() -> None:
    assert batch_indexes(100, 32, 5, seed=3) == batch_indexes(100, 32, 5, seed=3)
    assert batch_indexes(100, 32, 5, seed=3) != batch_indexes(100, 32, 5, seed=4)


def test_a_batch_larger_than_the_data_wraps() -> None:
    batch = batch_indexes(4, 10, 0, seed=0)
    assert len(batch) == 10
    assert sorted(batch[:4]) == sorted(batch[4:8]) == [0, 1, 2, 3]


def test_request_seeds_differ_by_part_and_fit_31_bits() -> None:
    seeds = {request_seed(0, step, "a") for step in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(1, 23) != request_seed(12, 3)


def test_draw_is_seeded_and_without_replacement_where_it_can_be() -> None:
    assert len(set(draw(range(10), 10, 0, 1))) == 10
    assert draw(range(10), 4, 0, 1) == draw(range(10), 4, 0, 1)
    assert len(draw(range(3), 7, 0)) == 7


def test_orders_stay_as_they_are() -> None:
    """Runs in progress are resumed by them; written down when the first runs were made."""
    assert batch_indexes(100, 6, 17, seed=0) == [69, 50, 18, 86, 80, 9]
    assert batch_indexes(4, 10, 1, seed=2) == [2, 0, 2, 1, 0, 3, 1, 2, 0, 3]
    assert draw(range(50), 5, 3, 1) == [19, 27, 38, 44, 11]
    assert draw(range(20_000), 3, 0, 1) == [19_858, 10_442, 17_793]


def test_an_epoch_is_drawn_once_however_many_steps_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []

    def counted(seed: list[int]) -> np.random.Generator:
        drawn.append(seed)
        return np.random.Generator(np.random.PCG64(seed))

    monkeypatch.setattr(np.random, "default_rng", counted)
    for step in range(40):
        batch_indexes(50_000, 2_500, step, seed=12_345)
    assert drawn == [[12_345, 0], [12_345, 1]]
