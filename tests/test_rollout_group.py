"""The elastic pool over actors: who dies, hangs, joins late or disagrees.

By default most tests have threads for actors; ``make test-all`` runs each on Ray too.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_ray
import numpy as np
import pytest
from mortal_engine import MortalEngine

from cluster.groups.rollout_group import RolloutGroup
from cluster.launch import create_actor
from cluster.placement import Bundle
from cluster.roles import Probe
from fgaif.config import ClusterConfig
from fgaif.errors import ActorError, DataError, SyncError
from fgaif.types import WeightsManifest

on_ray = pytest.mark.parametrize("transport", ["ray"], indirect=True)
on_both = pytest.mark.parametrize("transport", ["threads", "ray"], indirect=True)

Start = Callable[..., RolloutGroup]


@pytest.fixture
def start(tmp_path: Path, transport: Any) -> Iterator[Start]:
    groups = []

    def begin(engines: int = 1, **how: Any) -> RolloutGroup:
        cluster = ClusterConfig.model_validate(
            {"rollout": {"replicas": engines, "chunk": 2}, "max_restarts": how.pop("restarts", 2)}
        )

        def create(name: str) -> Any:
            if transport is not fake_ray.ray:
                return fake_ray.start(MortalEngine, 0.1, tmp_path, name)
            bundle = Bundle(role="rollout", name=name, cpus=0.1, gpus=0)
            return create_actor(bundle, MortalEngine, (tmp_path, name), "1")

        group = RolloutGroup(create, cluster, **how)
        groups.append(group)
        return group

    yield begin
    for group in groups:
        group.stop()


def tell(folder: Path, name: str, what: str, times: int = 1) -> None:
    (folder / f"{name}.{what}").write_text("x" * times)


def starts(folder: Path, name: str) -> int:
    path = folder / f"{name}.started"
    return len(path.read_text()) if path.exists() else 0


def weights(version: int) -> tuple[WeightsManifest, Probe]:
    manifest = WeightsManifest(version=version, digest="", scaling=1.0, tensors={})
    expected = np.full(2, float(version), np.float32)
    return manifest, Probe(responses=[], expected=expected, reference=expected)


def ask(group: RolloutGroup, items: list[int]) -> Any:
    return group.generate(items)  # type: ignore[arg-type]


def doubled(items: list[int], version: int) -> list[tuple[int, int]]:
    return [(2 * item, version) for item in items]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@on_both
def test_a_dead_engine_s_chunk_is_done_again_at_the_same_version(
    start: Start, tmp_path: Path
) -> None:
    group = start(2)
    checks = group.load_weights(*weights(7)).result()
    assert {(check.arrived, check.mean_abs_diff) for check in checks} == {(1.0, 0.0)}
    until(lambda: starts(tmp_path, "rollout-0") == starts(tmp_path, "rollout-1") == 1)
    tell(tmp_path, "rollout-1", "die")
    items = list(range(9))
    assert ask(group, items).result() == doubled(items, 7)
    until(lambda: starts(tmp_path, "rollout-1") == 2)
    assert starts(tmp_path, "rollout-0") == 1
    tell(tmp_path, "rollout-0", "die-loading")
    group.load_weights(*weights(8)).result()
    assert ask(group, items).result() == doubled(items, 8)


def test_engines_join_and_leave_during_the_work(start: Start, tmp_path: Path) -> None:
    group = start(1)
    group.load_weights(*weights(3)).result()
    items = list(range(200))
    answers = ask(group, items)
    group.resize(3)
    until(lambda: starts(tmp_path, "rollout-2") == 1)
    group.resize(1)
    assert answers.result() == doubled(items, 3)
    assert starts(tmp_path, "rollout-0") == 1


class Doubt:
    """Says of the first engine that has begun to hang that it does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.forgotten: list[str] = []

    def problem(self, name: str, busy_s: float = 0.0) -> str | None:
        hangs = busy_s > 0 and not (self._folder / f"{name}.hang").exists()
        return "made no progress" if hangs and not self.forgotten else None

    def forget(self, name: str) -> None:
        self.forgotten.append(name)


def test_an_engine_that_hangs_is_replaced(start: Start, tmp_path: Path) -> None:
    tell(tmp_path, "rollout-0", "hang")
    group = start(1, watch=Doubt(tmp_path))
    assert ask(group, [1]).result() == doubled([1], 0)
    assert starts(tmp_path, "rollout-0") == 2


def test_an_engine_that_hangs_while_it_starts_is_replaced(start: Start, tmp_path: Path) -> None:
    group = start(1)
    ask(group, [1]).result()
    patience = {"start_timeout_s": 2.0}  # from now on: the first may take its time
    group._transport._cluster = group._transport._cluster.model_copy(update=patience)
    tell(tmp_path, "rollout-1", "hang-starting")
    group.resize(2)
    until(lambda: starts(tmp_path, "rollout-1") == 2)
    assert starts(tmp_path, "rollout-0") == 1


@on_ray
def test_the_death_of_an_engine_without_work_is_noticed(start: Start, tmp_path: Path) -> None:
    group = start(1)
    ask(group, [1]).result()
    os.kill(int((tmp_path / "rollout-0.pid").read_text()), signal.SIGKILL)
    until(lambda: starts(tmp_path, "rollout-0") == 2)


def test_a_sample_that_kills_is_set_aside(start: Start) -> None:
    group = start(2, restarts=9)
    assert ask(group, [1, -1, 3]).result() == [(2, 0), None, (6, 0)]


def test_restarts_in_a_row_are_bounded_and_the_first_cause_is_told(
    start: Start, tmp_path: Path
) -> None:
    tell(tmp_path, "rollout-0", "die", times=5)
    group = start(1, restarts=1)
    with pytest.raises(ActorError, match="rollout-0"):
        ask(group, [1, 2]).result()
    assert starts(tmp_path, "rollout-0") == 2


def test_what_an_engine_raises_reaches_the_caller_and_the_engine_stays(
    start: Start, tmp_path: Path
) -> None:
    group = start(1)
    with pytest.raises(DataError, match="rollout-0: -13 is not doubled"):
        ask(group, [-13]).result()
    assert ask(group, [1]).result() == doubled([1], 0)
    assert starts(tmp_path, "rollout-0") == 1


def test_an_engine_that_cannot_start_stops_the_work(start: Start, tmp_path: Path) -> None:
    tell(tmp_path, "rollout-0", "break")
    group = start(1)
    with pytest.raises(ActorError, match=r"rollout-0 could not start: .*does not start"):
        ask(group, [1]).result()


@pytest.mark.parametrize(
    ("fault", "message"),
    [("stale", "rollout-0 confirmed version 4"), ("differ", r"differ by 1 .* rollout-0")],
)
def test_wrong_weights_stop_the_run(start: Start, tmp_path: Path, fault: str, message: str) -> None:
    tell(tmp_path, "rollout-0", fault)
    group = start(1)
    with pytest.raises(SyncError, match=message):
        group.load_weights(*weights(5)).result()


def test_a_joiner_with_wrong_weights_gets_no_work(start: Start, tmp_path: Path) -> None:
    group = start(1)
    group.load_weights(*weights(5)).result()
    tell(tmp_path, "rollout-1", "differ")
    group.resize(2)
    until(lambda: failed(group))
    with pytest.raises(SyncError, match=r"differ by 1 .* rollout-1"):
        ask(group, [1]).result()


def failed(group: RolloutGroup) -> bool:
    try:
        ask(group, list(range(20))).result()
    except SyncError:
        return True
    return False


def test_the_number_that_somebody_wishes_is_followed(start: Start, tmp_path: Path) -> None:
    wished: list[int] = []
    told: list[tuple[int, int]] = []
    group = start(
        1,
        wished=lambda: wished[-1] if wished else None,
        report=lambda members, queued, _: told.append((len(members), queued)),
    )
    ask(group, [1]).result()
    wished.append(2)
    until(lambda: starts(tmp_path, "rollout-1") == 1)
    wished.append(1)
    until(lambda: told[-1] == (1, 0) and (2, 0) in told)


def test_weights_of_long_ago_leave_the_object_store(start: Start) -> None:
    group = start(1)
    for version in range(1, 12):
        group.load_weights(*weights(version)).result()
    assert len(group._transport._weights) <= 5
