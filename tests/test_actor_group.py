"""Actors that die are brought back to their state and asked again, exactly once; within bounds.

By default most tests have threads for actors; ``make test-all`` runs each on Ray too.
"""

import gc
import itertools
import os
import sys
import time
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path
from signal import SIGSTOP
from typing import Any

import fake_ray
import pytest
import ray
from mortal import Mortal, starts, tell
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import cluster.groups.actor_group
from cluster.groups.actor_group import ActorGroup, RestartLimits, Submit
from cluster.groups.placed_actor import PlacedActor
from cluster.groups.role_groups import ReplicaGroup, StatelessActor
from fgaif.errors import ActorError, DataError
from fgaif.pending import Pending

_tokens = itertools.count()


@pytest.fixture(autouse=True)
def actors(transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if transport is not ray:
        monkeypatch.setattr(sys.modules[__name__], "ray", transport)
        monkeypatch.setattr(sys.modules[__name__], "create", partial(fake_ray.start, Mortal))


on_ray = pytest.mark.parametrize("transport", ["ray"], indirect=True)
on_both = pytest.mark.parametrize("transport", ["threads", "ray"], indirect=True)


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.groups.actor_group, "_SLICE_S", 0.2)


class Suspicion:
    """A watch that suspects an actor which has been at work for half a second."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def problem(self, name: str, busy_s: float = 0.0) -> str | None:
        return "made no progress" if busy_s > 0.5 else None

    def forget(self, name: str) -> None:
        self.forgotten.append(name)


def create(cpus: float, *arguments: Any) -> tuple[Any, PlacementGroup]:
    group = placement_group([{"CPU": cpus}])
    place = PlacementGroupSchedulingStrategy(placement_group=group)
    options = {"num_cpus": cpus, "scheduling_strategy": place}
    return ray.remote(Mortal).options(**options).remote(*arguments), group


def actor_group(folder: Path, world: int = 1, *, restarts: int = 2, watch: Any = None,
         start_s: float = 60, call_s: float = 60, cpus: float = 0.1) -> ActorGroup:  # fmt: skip
    def start() -> list[PlacedActor]:
        token = f"meeting{next(_tokens)}"
        return [
            PlacedActor(name, *create(cpus, folder, name, rank, world, token))
            for rank, name in enumerate("ab"[:world])
        ]

    limits = RestartLimits(call_s=call_s, start_s=start_s, restarts=restarts)
    return ActorGroup("toy", start, limits, watch)


def every(name: str, *arguments: Any) -> Submit:
    return lambda actors: [getattr(actor, name).remote(*arguments) for actor in actors]


def add(toy: ActorGroup, digit: int) -> Pending[list[int]]:
    return toy.call(every("add", digit), keep=True)


def read(toy: ActorGroup) -> Pending[list[int]]:
    return toy.call(every("read"))


def seven_steps(toy: ActorGroup, folder: Path, before: dict[int, Any]) -> list[int]:
    """All kinds of calls; ``before[i]`` happens before step i. The answers, what was saved last."""
    saved, settled = folder / "saved", folder / "settled"

    def save() -> list[int]:
        toy.save(every("save", saved)).result()
        saved.rename(settled)
        toy.set_restore_point(every("restore", settled))
        return [int(settled.read_text())]

    steps = [
        *(lambda: add(toy, 1).result(), lambda: add(toy, 2).result(), lambda: read(toy).result()),
        *(save, lambda: add(toy, 3).result(), lambda: add(toy, 4).result()),
        lambda: read(toy).result(),
    ]
    answers = []
    for number, step in enumerate(steps):
        before.get(number, lambda: None)()
        answers += step()
    return answers


ANSWERS = [1, 12, 12, 12, 123, 1234, 1234]
METHODS = ["add", "add", "read", "save", "add", "add", "read"]


@on_both
@pytest.mark.parametrize(("what", "steps"), [("die", (0, 2, 3, 5)), ("die-after", (1, 3, 4, 6))])
def test_a_death_in_any_call_changes_no_answer(
    tmp_path: Path, what: str, steps: tuple[int, ...]
) -> None:
    toy = actor_group(tmp_path, restarts=1)
    orders = {step: partial(tell, tmp_path, "a", what, METHODS[step]) for step in steps}
    assert seven_steps(toy, tmp_path, orders) == ANSWERS
    assert starts(tmp_path, "a") == 5
    assert len(toy.recoveries) == 4
    toy.stop()


def test_a_death_between_calls_is_found_by_the_next(tmp_path: Path) -> None:
    toy = actor_group(tmp_path)
    kill = lambda: slay(toy)  # noqa: E731
    assert seven_steps(toy, tmp_path, {1: kill, 5: kill}) == ANSWERS
    assert starts(tmp_path, "a") == 3
    toy.stop()


def test_a_team_that_is_tended_brings_back_its_dead_before_the_next_call(tmp_path: Path) -> None:
    toy = actor_group(tmp_path)
    toy.supervise()
    assert add(toy, 1).result() == [1]
    slay(toy)
    until_recovered(toy)
    assert starts(tmp_path, "a") == 2
    assert add(toy, 2).result() == [12]
    assert len(toy.recoveries) == 1
    toy.stop()


def test_nobody_is_brought_back_to_a_base_that_is_about_to_go(tmp_path: Path) -> None:
    """Between a checkpoint's writing and ``set_restore_point`` older ones are removed."""
    toy = actor_group(tmp_path)
    toy.supervise()
    add(toy, 1).result()
    toy.save(every("save", tmp_path / "saved")).result()
    slay(toy)
    time.sleep(1)
    assert not toy.recoveries
    toy.set_restore_point(every("restore", tmp_path / "saved"))
    until_recovered(toy)
    assert add(toy, 2).result() == [12]
    toy.stop()


class NoSign(Suspicion):
    """A watch that has no heartbeat of the first actor."""

    def problem(self, name: str, busy_s: float = 0.0) -> str | None:
        return None if self.forgotten else "sent no heartbeat"


@on_ray
def test_a_tended_team_replaces_the_frozen_too(tmp_path: Path) -> None:
    toy = actor_group(tmp_path, watch=NoSign())
    os.kill(ray.get(toy.members[0].actor.__ray_call__.remote(lambda _: os.getpid())), SIGSTOP)
    toy.supervise()
    until_recovered(toy)
    assert add(toy, 1).result() == [1]
    toy.stop()


def test_a_tended_team_gives_up_after_as_many_deaths_and_tells_the_next_caller(
    tmp_path: Path,
) -> None:
    toy = actor_group(tmp_path, restarts=0)
    toy.supervise()
    assert add(toy, 1).result() == [1]
    slay(toy)
    assert toy._supervisor is not None
    toy._supervisor.join(30)
    assert not toy._supervisor.is_alive()
    with pytest.raises(ActorError, match="a died"):
        read(toy).result()
    assert starts(tmp_path, "a") == 1
    toy.stop()


def test_all_calls_that_wait_are_made_again_in_order(tmp_path: Path) -> None:
    """The second ``add`` is done when the actor dies, and only its answer is lost."""
    toy = actor_group(tmp_path)
    add(toy, 1).result()
    tell(tmp_path, "a", "die-after", "add")
    calls = [add(toy, 2), read(toy), add(toy, 3), read(toy)]
    assert [call.result() for call in reversed(calls)] == [[123], [123], [12], [12]]
    assert starts(tmp_path, "a") == 2
    toy.stop()


def test_two_teams_may_die_in_the_same_step(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    actor_groups = [actor_group(folder) for folder in folders]
    for folder, toy in zip(folders, actor_groups, strict=True):
        add(toy, 1).result()
        tell(folder, "a", "die", "add")
    calls = [add(toy, 2) for toy in actor_groups]
    assert [call.result() for call in calls] == [[12], [12]]
    for toy in actor_groups:
        toy.stop()


@pytest.mark.parametrize(("what", "victim"), [("die", "a"), ("hang", "b"), ("late", "b")])
def test_when_one_rank_is_lost_all_start_again(tmp_path: Path, what: str, victim: str) -> None:
    """Its fellow waits for it in a collective; ``late``: the fellow raises before it dies."""
    toy = actor_group(tmp_path, 2, watch=Suspicion() if what == "hang" else None)
    assert add(toy, 1).result() == [1, 1]
    tell(tmp_path, victim, what, "add")
    if what == "late":
        tell(tmp_path, "ab".replace(victim, ""), "echo", "add")
    assert add(toy, 2).result() == [12, 12]
    assert (starts(tmp_path, "a"), starts(tmp_path, "b")) == (2, 2)
    assert read(toy).result() == [12, 12]
    toy.stop()


def test_deaths_during_the_recovery_are_mended_too(tmp_path: Path) -> None:
    """The first replacement dies at its start, the next while it is restored, one in the replay."""
    toy = actor_group(tmp_path, restarts=4)
    (tmp_path / "base").write_text("5")
    toy.restore(every("restore", tmp_path / "base")).result()
    add(toy, 6).result()
    slay(toy)
    for method in ("start", "restore", "add"):
        tell(tmp_path, "a", "die", method)
    assert read(toy).result() == [56]
    assert starts(tmp_path, "a") == 5
    assert len(toy.recoveries) == 1
    toy.stop()


def test_restarts_in_a_row_are_bounded_and_the_first_cause_is_told(tmp_path: Path) -> None:
    toy = actor_group(tmp_path, restarts=1)
    for digit in (1, 2, 3):  # each time it answers in the end
        tell(tmp_path, "a", "die", "add")
        add(toy, digit).result()
    tell(tmp_path, "a", "die", "add", times=9)
    with pytest.raises(ActorError, match=r"(?s)a died: .*failure 2 .*cluster.max_restarts = 1"):
        add(toy, 4).result()
    assert starts(tmp_path, "a") == 5
    with pytest.raises(ActorError, match="a died: "):  # and so it stays
        read(toy)
    toy.stop()


def test_an_actor_that_hangs_is_replaced_as_the_watch_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Suspicion()
    toy = actor_group(tmp_path, watch=watch)
    tell(tmp_path, "a", "hang", "add")
    assert add(toy, 1).result() == [1]
    assert watch.forgotten == ["a"]
    assert "a made no progress" in caplog.text
    toy.stop()


def test_the_time_for_a_call_is_the_last_resort(tmp_path: Path) -> None:
    toy = actor_group(tmp_path, call_s=1, restarts=0)
    tell(tmp_path, "a", "hang", "add")
    with pytest.raises(ActorError, match=r"a did not answer within 1 s.*cluster.call_timeout_s"):
        add(toy, 1).result()
    toy.stop()


def until_recovered(toy: ActorGroup) -> None:
    end = time.monotonic() + 30
    while not toy.recoveries:
        assert time.monotonic() < end
        time.sleep(0.05)


def slay(toy: ActorGroup) -> None:
    """Kill the first member and wait until Ray has noticed."""
    actor = toy.members[0].actor
    ray.kill(actor)
    with suppress(ray.exceptions.RayActorError):
        while True:
            ray.get(actor.__ray_ready__.remote())


def test_a_start_that_hangs_is_repeated(tmp_path: Path, transport: Any) -> None:
    toy = actor_group(tmp_path, start_s=6 if transport is fake_ray.ray else 0.5)
    add(toy, 1).result()
    tell(tmp_path, "a", "hang", "start")
    slay(toy)
    assert add(toy, 2).result() == [12]
    assert starts(tmp_path, "a") == 3
    toy.stop()


def test_an_actor_without_room_is_not_started_again_and_again(tmp_path: Path) -> None:
    toy = actor_group(tmp_path, start_s=1, cpus=99)
    with pytest.raises(ActorError, match=r"a: no node had room .*cluster.start_timeout_s = 1"):
        add(toy, 1).result()
    toy.stop()


def test_an_error_in_the_work_is_no_death(tmp_path: Path) -> None:
    """Nobody is replaced for it; but its half of a change must not last."""
    toy = actor_group(tmp_path)
    add(toy, 1).result()
    with pytest.raises(DataError, match="a: -1 is not a digit"):
        add(toy, -1).result()
    assert starts(tmp_path, "a") == 1
    assert read(toy).result() == [1]
    assert starts(tmp_path, "a") == 2
    toy.stop()


def test_undisturbed_answers_come_at_once_and_batches_go_with_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that came only at the end of a slice would come later than the test may take."""
    monkeypatch.setattr(cluster.groups.actor_group, "_SLICE_S", 1000.0)

    class Batch:
        pass

    toy, batch = actor_group(tmp_path), Batch()
    toy.call(lambda actors, held=batch: [actors[0].add.remote(1)], keep=True).result()  # type: ignore[misc]
    held = weakref.ref(batch)
    del batch
    gc.collect()
    assert held() is not None
    assert [read(toy).result() for _ in range(20)] == [[1]] * 20
    toy.save(every("save", tmp_path / "saved")).result()
    toy.set_restore_point(every("restore", tmp_path / "saved"))
    gc.collect()
    assert held() is None
    toy.stop()


def handle(folder: Path, name: str, restarts: int = 2) -> StatelessActor:
    return StatelessActor(
        name,
        partial(create, 0.1, folder, name),
        RestartLimits(call_s=60, start_s=60, restarts=restarts),
    )


def double(actor: Any) -> Any:
    return actor.double


def test_a_dead_replica_s_share_is_done_again(tmp_path: Path) -> None:
    pool = ReplicaGroup([handle(tmp_path, name) for name in "ab"])
    tell(tmp_path, "b", "die", "double")
    items = list(range(9))
    assert pool.spread(double, items, [1.0] * 9).result() == [2 * item for item in items]
    assert (starts(tmp_path, "a"), starts(tmp_path, "b")) == (1, 2)
    with pytest.raises(DataError, match=r"[ab]: 13 is not doubled"):
        pool.spread(double, [13, 13], [1.0, 1.0]).result()
    assert (starts(tmp_path, "a"), starts(tmp_path, "b")) == (1, 2)
    pool.stop()
