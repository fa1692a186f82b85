"""Learning rate over PPO steps."""

import pytest

from fgaif.ppo.schedule import lr_factor


def factors(schedule, warmup=0, steps=4):
    return [lr_factor(i, steps=steps, warmup=warmup, schedule=schedule) for i in range(steps)]


def test_constant_after_warmup():
    assert factors("constant", warmup=2) == [0.5, 1.0, 1.0, 1.0]


def test_cosine_by_hand():
    """cos(pi / 4) = 0.7071, so the factors are (1 + cos) / 2 at quarters of the way."""
    assert factors("cosine") == pytest.approx([1.0, 0.853553, 0.5, 0.146447], rel=1e-5)
    assert lr_factor(4, steps=4, warmup=0, schedule="cosine") == pytest.approx(0.0)
    assert lr_factor(9, steps=4, warmup=0, schedule="cosine") == pytest.approx(0.0)
