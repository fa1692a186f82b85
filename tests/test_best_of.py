"""Best-of-k over all subsets, against counting them one by one."""

from itertools import combinations
from math import log
from pathlib import Path

import numpy as np
import pytest

from fgaif.errors import ConfigError
from fgaif.eval.best_of import best_of_curve, best_of_figure, best_of_weights, curve_ks
from fgaif.eval.plots import save_png


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_weights_are_those_of_all_subsets(k: int) -> None:
    scores = np.array([[0.3, -1.0, 2.0, 0.3, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    counted = np.zeros_like(scores)
    for row, values in enumerate(scores):
        subsets = list(combinations(range(len(values)), k))
        for subset in subsets:
            best = max(subset, key=lambda at: (values[at], -at))  # the earlier of equal ones
            counted[row, best] += 1 / len(subsets)
    np.testing.assert_allclose(best_of_weights(scores, k), counted, atol=1e-12)
    assert best_of_weights(scores, 5).argmax(axis=1).tolist() == scores.argmax(axis=1).tolist()


def test_more_samples_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="best of 3: there are 2"):
        best_of_weights(np.zeros((1, 2)), 3)


def test_the_curve_ends_at_what_was_sampled() -> None:
    assert curve_ks(16) == (1, 2, 4, 8, 16)
    assert curve_ks(6) == (1, 2, 4, 6)
    assert curve_ks(1) == (1,)


def test_the_curve_follows_the_choice(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 8))
    errors = np.stack([(scores < 0).astype(float), np.ones_like(scores)], axis=-1)
    nothing = np.zeros((50, 8, 2))
    counts = {"reward": np.stack([scores, np.ones_like(scores)], -1), "errors": errors}
    rows = best_of_curve(scores, {**counts, "nothing": nothing})
    assert [row["k"] for row in rows] == [1, 2, 4, 8]
    assert rows[0]["reward"] == pytest.approx(scores.mean())
    assert rows[-1]["reward"] == pytest.approx(scores.max(axis=1).mean())
    shares = [row["errors"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert rows[2]["kl_bound"] == pytest.approx(log(4) - 3 / 4)
    assert rows[0]["nothing"] is None
    for row in rows:
        low, high = row["reward_interval"]
        assert low < row["reward"] < high
    figure = best_of_figure(rows, {"reward": "reward", "errors": "errors", "nothing": "-"})
    assert len(figure.axes) == 2
    save_png(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
