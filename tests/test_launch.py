"""Actors that die are replaced, brought to the same state, and asked again; within bounds."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from mortal import Mortal

from cluster.handles import Handle, Pool
from cluster.launch import create_actor
from cluster.placement import Bundle
from cluster.rollouts import RolloutGroup
from fgaif.errors import ActorError, DataError


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # workers import Mortal
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=here,
    )
    yield
    ray.shutdown()


def start(folder: Path, name: str, *, restarts: int = 2, timeout_s: float = 60) -> Handle:
    bundle = Bundle(role="rollout", name=name, cpus=0.1, gpus=0, memory_gib=0)
    environment = partial(create_actor, bundle, Mortal, (folder, name), "1")
    handle = Handle(name, environment, timeout_s=timeout_s, start_timeout_s=60, restarts=restarts)
    ray.get(handle.actor.__ray_ready__.remote(), timeout=60)
    return handle


def tell(folder: Path, name: str, what: str, times: int = 1) -> None:
    (folder / f"{name}.{what}").write_text("x" * times)


def starts(folder: Path, name: str) -> int:
    return len((folder / f"{name}.started").read_text())


def double(actor: Any) -> Any:
    return actor.double


def test_a_dead_replica_s_share_is_done_again_at_the_same_version(tmp_path: Path) -> None:
    pool = RolloutGroup([start(tmp_path, name) for name in ("a", "b")])
    assert pool.load_weights(7).result() == [7, 7]
    tell(tmp_path, "b", "die")
    items = list(range(9))
    assert pool.spread(double, items, [1.0] * 9).result() == [(2 * item, 7) for item in items]
    assert (starts(tmp_path, "a"), starts(tmp_path, "b")) == (1, 2)
    pool.load_weights(8).result()
    tell(tmp_path, "b", "die")
    assert pool.spread(double, items, [1.0] * 9).result()[-1] == (16, 8)
    pool.stop()


def test_a_replica_that_hangs_is_replaced(tmp_path: Path) -> None:
    handle = start(tmp_path, "a", timeout_s=5)
    assert handle.call(double, [0]).result() == [(0, 0)]
    tell(tmp_path, "a", "hang")
    assert handle.call(double, [1]).result() == [(2, 0)]
    assert starts(tmp_path, "a") == 2
    handle.stop()


def test_calls_that_wait_for_the_same_dead_actor_share_its_replacement(tmp_path: Path) -> None:
    handle = start(tmp_path, "a")
    tell(tmp_path, "a", "die")
    calls = [handle.call(double, [number]) for number in range(4)]
    assert [call.result() for call in calls] == [[(2 * number, 0)] for number in range(4)]
    assert starts(tmp_path, "a") == 2
    handle.stop()


def test_restarts_are_bounded_and_the_first_cause_is_told(tmp_path: Path) -> None:
    handle = start(tmp_path, "a", restarts=1)
    tell(tmp_path, "a", "die", times=5)
    with pytest.raises(ActorError, match="a died: "):
        handle.call(double, [1]).result()
    assert starts(tmp_path, "a") == 2
    handle.stop()


def test_an_error_in_the_work_is_no_reason_to_start_again(tmp_path: Path) -> None:
    pool = Pool([start(tmp_path, "a")])
    with pytest.raises(DataError, match="a: 13 is not doubled"):
        pool.spread(double, [13], [1.0]).result()
    assert starts(tmp_path, "a") == 1
    pool.stop()
