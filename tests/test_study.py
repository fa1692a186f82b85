"""The arithmetic of a study and the configurations of its runs; stages are tested elsewhere."""

from pathlib import Path

import pytest
from rich.console import Console

from cluster.pipeline.study import interval, nearest_step, run_study, variant_config
from fgaif.config import load_config
from fgaif.errors import ConfigError

CONFIG = Path(__file__).parents[1] / "configs" / "scenes_study.yaml"


def test_interval_of_three_runs() -> None:
    """Mean 2, standard deviation 1, so half-width = 4.303 / sqrt(3) = 2.484."""
    mean, half_width = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(2.484, abs=1e-3)


def test_the_nearest_checkpoint_in_kl_and_the_earliest_of_equals() -> None:
    kl = {2: 1.0, 4: 3.0, 6: 3.0, 8: 6.0}
    assert nearest_step(kl, [2, 4, 6, 8], 2.9) == 4
    assert nearest_step(kl, [2, 8], 4.0) == 8


def test_a_variant_has_its_overrides_seed_and_folder(tmp_path: Path) -> None:
    config = load_config(CONFIG, [f"dir={tmp_path}"])
    last = variant_config(config, "last", 2)
    assert (last.ppo.shape.placement, last.seed, last.name) == ("last", 2, "last-seed2")
    assert last.run_dir == tmp_path / "scenes_study" / "variants" / "last-seed2"
    assert last.ppo.keep_checkpoints >= last.ppo.steps // last.ppo.checkpoint_every


def test_one_seed_gives_no_interval_and_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"study\.seeds = \[0\]"):
        run_study(load_config(None, ["study.seeds=[0]"]), Console())
