"""What a cluster began is ended, also where it cannot begin, and whoever began it."""

import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from mortal import Mortal
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from cluster.groups.role_groups import JudgeGroup
from cluster.launch import Cluster, check_socket_path
from cluster.monitoring.heartbeat import heartbeat_stores
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
def test_the_store_of_a_run_that_cannot_begin_goes_away(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.run_dir.write_text("a file in the place of the folder")
    with (
        pytest.raises(DataError, match=r"live\.json: cannot be written"),
        Cluster(settings, (), live=True),
    ):
        pass
    until(lambda: not heartbeat_stores("mine"))
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
    try:
        assert full.wait(30)
        with Cluster(settings, {"learner"}) as cluster:
            with pytest.raises(ActorError, match=r"no node had room .*start_timeout_s = 1"):
                cluster.learner()
            until(lambda: len(held()) == 1)
    finally:
        remove_placement_group(full)


class Judge:
    """Doubles numbers; dies once if the file is there."""

    def __init__(self, model: Path, settings: Config) -> None:
        self._order = settings.run_dir / "die"

    def answer(self, items: list[int]) -> list[int]:
        if self._order.exists():
            self._order.unlink()
            os._exit(1)
        return [2 * item for item in items]


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_what_another_process_started_in_a_judge_s_place_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its resources are not held until the job ends: the roles of PPO need them."""
    stand_in(monkeypatch, "actors.judge", "JudgeActor", Judge)
    settings = config(tmp_path, "feedback.verifier=scenes:verifier", "cluster.judge.cpus=1.5")
    settings.run_dir.mkdir()

    def ask(judges: JudgeGroup, items: list[int]) -> list[int]:
        (settings.run_dir / "die").touch()
        return judges.spread(lambda judge: judge.answer, items, [1.0] * len(items)).result()

    with Cluster(settings, {"judge"}) as cluster:
        judges = cluster.judges()
        asker = ray.remote(ask).options(num_cpus=0)
        assert ray.get(asker.remote(judges, [1, 2])) == [2, 4]
        # As if that process was lost: the next one finds the first judge dead and nothing else.
        assert ray.get(asker.remote(judges, [3])) == [6]
        assert [name.startswith("judge-0-") for name in held()] == [True]
        cluster.stop("judge")
        until(lambda: not held())


class AllKinds:
    """Scores nothing; knows its folder."""

    def __init__(self, rewards: Path, settings: Config) -> None:
        self._rewards = rewards

    def score_pairs(self, pairs: list[Any]) -> list[np.ndarray]:
        return [np.full((1, 3, 3), len(self._rewards.name), np.float32) for _ in pairs]


@pytest.mark.usefixtures("local_ray")
def test_shared_scorers_are_one_actor_for_all_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "actors.reward", "SharedRewardActor", AllKinds)
    settings = config(tmp_path, "cluster.reward={shared: true, cpus: 0.5}")
    response = SimpleNamespace(token_ids=[1])
    with Cluster(settings, {"reward"}) as cluster:
        scores = cluster.rewards(tmp_path / "rewards").score([response], [[0]]).result()  # type: ignore[list-item]
        assert len(held()) == 1
    assert scores[0].probs.tolist() == np.full((1, 3, 3), 7.0).tolist()


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


def test_a_temporary_folder_too_long_for_sockets_is_named_with_the_variable() -> None:
    check_socket_path("/tmp")
    with pytest.raises(ConfigError, match="RAY_TMPDIR"):
        check_socket_path("/tmp/" + "long/" * 12)
