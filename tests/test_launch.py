"""What a cluster began is ended, also where it cannot begin, and whoever began it."""

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray
from mortal import Mortal
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from cluster.board import boards
from cluster.launch import Cluster
from fgaif.config import Config, load_config
from fgaif.errors import ActorError, ConfigError, DataError


def config(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"dir={folder}", "name=mine", *overrides])


def test_ray_that_it_started_is_stopped_if_the_roles_do_not_fit(tmp_path: Path) -> None:
    settings = config(tmp_path, "cluster.local_cpus=1", "cluster.rollout.cpus=99")
    with pytest.raises(ConfigError, match="rollout: needs 99 CPUs"), Cluster(settings, {"rollout"}):
        pass
    assert not ray.is_initialized()


@pytest.mark.usefixtures("local_ray")
def test_the_board_of_a_run_that_cannot_begin_goes_away(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.run_dir.write_text("a file in the place of the folder")
    with (
        pytest.raises(DataError, match=r"live\.json: cannot be written"),
        Cluster(settings, (), live=True),
    ):
        pass
    until(lambda: not boards("mine"))
    assert ray.is_initialized()


@pytest.mark.usefixtures("local_ray")
def test_ranks_without_room_are_given_up_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "actors.learner", "LearnerActor", Mortal)
    settings = config(
        tmp_path, "cluster.learner.replicas=2", "cluster.learner.cpus=0.5",
        "cluster.start_timeout_s=1",
    )  # fmt: skip
    full = placement_group([{"CPU": 2}])
    assert full.wait(30)
    with Cluster(settings, {"learner"}) as cluster:
        with pytest.raises(ActorError, match=r"no node had room .* cluster\.start_timeout_s = 1"):
            cluster.learner()
        until(lambda: len(held()) == 1)
    remove_placement_group(full)


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, cls: type) -> None:
    """What ``Cluster`` imports when it starts a role."""
    fake: Any = ModuleType(module)
    setattr(fake, name, cls)
    monkeypatch.setitem(sys.modules, module, fake)


def held() -> list[str]:
    """Names of the placement groups there are."""
    return [row["name"] for row in placement_group_table().values() if row["state"] != "REMOVED"]


def until(reached: Any) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)
