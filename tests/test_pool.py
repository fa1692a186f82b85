"""Rules of the elastic pool, with members that do what the test says when it says so."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from actors.pool import ElasticPool, Task, wanted_members
from fgaif.config import AutoscaleConfig
from fgaif.errors import ActorError


class Stage:
    """A transport that only writes down what it is told; the test plays the members."""

    def __init__(self, size: int = 0, **settings: Any) -> None:
        self.pool = ElasticPool(transport=self, **{"max_restarts": 2, **settings})
        self.lives: dict[str, int] = {}
        self.tasks: dict[str, Task] = {}
        self.loads: list[str] = []
        self.stopped: list[str] = []
        self.pool.resize(size)
        for name in list(self.lives):
            self.ready(name)

    def start(self, name: str, life: int) -> None:
        self.lives[name] = life

    def work(self, name: str, life: int, task: Task, load: bool) -> None:
        assert life == self.lives[name]
        assert name not in self.tasks
        self.tasks[name] = task
        if load:
            self.loads.append(f"{name} {task.weights}")

    def stop(self, name: str, life: int) -> None:
        self.stopped.append(name)
        self.tasks.pop(name, None)

    def ask(self, items: Sequence[Any], chunk: int, **how: Any) -> "Future[list[Any]]":
        future: Future[list[Any]] = Future()
        self.pool.submit("double", items, chunk, future, **how)
        return future

    def load(self, weights: int) -> "Future[None]":
        future: Future[None] = Future()
        self.pool.load(weights, future)
        return future

    def ready(self, name: str) -> None:
        self.pool.started(name, self.lives[name])

    def done(self, name: str) -> None:
        task = self.tasks.pop(name)
        self.pool.finished(name, self.lives[name], [2 * item for item in task.items])

    def die(self, name: str, *, ready: bool = True) -> None:
        self.pool.died(name, self.lives[name], ActorError(f"{name} died"))
        if ready and name in self.pool.members:
            self.ready(name)

    def given(self) -> dict[str, list[Any]]:
        return {name: list(task.items) for name, task in self.tasks.items()}

    def names(self) -> list[str]:
        return sorted(self.pool.members)


def test_chunks_go_to_whoever_is_free_and_answers_come_in_order() -> None:
    stage = Stage(2)
    answers = stage.ask([1, 2, 3, 4, 5], 2)
    assert stage.given() == {"rollout-0": [1, 2], "rollout-1": [3, 4]}
    stage.done("rollout-1")
    assert stage.given() == {"rollout-0": [1, 2], "rollout-1": [5]}
    stage.done("rollout-1")
    assert not answers.done()
    stage.done("rollout-0")
    assert answers.result(0) == [2, 4, 6, 8, 10]
    assert stage.ask([], 2).result(0) == []


def test_chunks_do_not_depend_on_the_number_of_members() -> None:
    cut = []
    for size in (1, 2, 3):
        stage = Stage(size)
        stage.ask(list(range(10)), 4)
        seen = []
        while stage.tasks:
            name = min(stage.tasks)
            seen.append(stage.given()[name])
            stage.done(name)
        cut.append(sorted(seen))
    assert cut == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]] * 3


def test_a_joiner_loads_the_weights_before_its_first_chunk() -> None:
    stage = Stage(1)
    loaded = stage.load(1)
    assert stage.loads == ["rollout-0 1"]
    assert not loaded.done()
    stage.done("rollout-0")
    assert loaded.done()
    answers = stage.ask([1, 2], 1)
    stage.pool.resize(2)
    assert stage.given() == {"rollout-0": [1]}
    stage.ready("rollout-1")
    assert stage.given()["rollout-1"] == [2]
    assert stage.loads[1:] == ["rollout-1 1"]
    stage.done("rollout-0")
    stage.done("rollout-1")
    assert answers.result(0) == [2, 4]


def test_weights_have_arrived_when_they_are_loaded_not_after_the_chunk() -> None:
    stage = Stage(1)
    answers = stage.ask([1, 2], 1)
    loaded = stage.load(1)
    later = stage.ask([3], 1)
    stage.done("rollout-0")
    stage.done("rollout-0")
    assert stage.given() == {"rollout-0": [3]}
    assert not loaded.done()
    stage.pool.loaded("rollout-0", stage.lives["rollout-0"])
    assert loaded.done()
    stage.done("rollout-0")
    assert stage.loads == ["rollout-0 1"]
    assert answers.done()
    assert later.done()


def test_a_chunk_is_done_with_the_weights_it_was_asked_for_with() -> None:
    stage = Stage(1)
    stage.load(1)
    stage.done("rollout-0")
    first, second = stage.ask([1], 1), stage.ask([2], 1)
    loaded = stage.load(2)
    third = stage.ask([3], 1)
    assert stage.tasks["rollout-0"].weights == 1
    stage.done("rollout-0")
    assert stage.tasks["rollout-0"].weights == 1
    assert not loaded.done()
    assert stage.pool.oldest_weights() == 1
    stage.done("rollout-0")
    assert stage.loads[-1] == "rollout-0 2"
    stage.done("rollout-0")
    assert loaded.done()
    assert [future.result(0) for future in (first, second, third)] == [[2], [4], [6]]


def test_older_weights_are_loaded_again_for_a_chunk_whose_member_died() -> None:
    stage = Stage(2)
    stage.load(1)
    for name in stage.names():
        stage.done(name)
    old = stage.ask([1, 2], 1)
    stage.load(2)
    stage.done("rollout-0")  # goes on to weights 2
    stage.done("rollout-0")
    stage.die("rollout-1", ready=False)
    assert stage.given() == {"rollout-0": [2]}
    assert stage.loads[-1] == "rollout-0 1"
    stage.done("rollout-0")
    assert old.result(0) == [2, 4]
    assert stage.loads[-1] == "rollout-0 2"


def test_a_member_that_leaves_finishes_its_chunk_first() -> None:
    stage = Stage(3)
    answers = stage.ask([1, 2], 1)
    stage.pool.resize(1)
    assert stage.stopped == ["rollout-2"]  # was idle
    stage.done("rollout-1")
    assert stage.stopped == ["rollout-2", "rollout-1"]
    stage.done("rollout-0")
    assert answers.result(0) == [2, 4]
    assert stage.names() == ["rollout-0"]


def test_members_that_have_not_started_are_let_go_first_and_names_are_used_again() -> None:
    stage = Stage(1)
    stage.pool.resize(3)
    stage.pool.resize(2)
    assert stage.stopped == ["rollout-2"]
    stage.pool.resize(3)
    assert stage.names() == ["rollout-0", "rollout-1", "rollout-2"]


def test_the_chunk_of_a_dead_member_goes_first_to_the_next() -> None:
    stage = Stage(2)
    answers = stage.ask([1, 2, 3, 4, 5, 6], 2)
    stage.die("rollout-0", ready=False)
    stage.done("rollout-1")
    assert stage.given() == {"rollout-1": [1, 2]}
    stage.ready("rollout-0")
    stage.done("rollout-1")
    stage.done("rollout-0")
    assert answers.result(0) == [2, 4, 6, 8, 10, 12]
    assert stage.pool.members["rollout-0"].restarts == 1


def test_late_news_of_a_replaced_member_is_ignored() -> None:
    stage = Stage(1)
    answers = stage.ask([1], 1)
    old = stage.lives["rollout-0"]
    stage.die("rollout-0")
    stage.pool.finished("rollout-0", old, [99])
    stage.pool.died("rollout-0", old, ActorError("again"))
    assert not answers.done()
    stage.done("rollout-0")
    assert answers.result(0) == [2]


def test_a_sample_that_keeps_killing_members_is_set_aside_and_the_others_are_answered() -> None:
    stage = Stage(1, max_restarts=5)
    answers = stage.ask([1, 13, 3], 3)
    while stage.tasks:
        if 13 in stage.given()["rollout-0"]:
            stage.die("rollout-0")
        else:
            stage.done("rollout-0")
    assert answers.result(0) == [2, None, 6]
    assert stage.pool.set_aside == [13]
    assert stage.pool.members["rollout-0"].restarts == 4


def test_several_such_samples_in_a_chunk_do_not_use_up_the_restarts() -> None:
    stage = Stage(1, max_restarts=5)
    answers = stage.ask([13, 14, 15, 1], 4)
    while stage.tasks:
        if {13, 14, 15} & set(stage.given()["rollout-0"]):
            stage.die("rollout-0")
        else:
            stage.done("rollout-0")
    assert answers.result(0) == [None, None, None, 2]
    assert stage.pool.set_aside == [13, 14, 15]


def test_a_sample_alone_in_its_chunk_is_set_aside_after_two_deaths() -> None:
    stage = Stage(1)
    answers = stage.ask([13], 1)
    stage.die("rollout-0")
    assert not answers.done()
    stage.die("rollout-0")
    assert answers.result(0) == [None]


def test_restarts_in_a_row_are_bounded_and_every_answer_starts_the_count_anew() -> None:
    stage = Stage(1, max_restarts=1)
    answers = stage.ask([1, 2, 3, 4], 2)
    stage.die("rollout-0")
    stage.done("rollout-0")
    stage.die("rollout-0")
    stage.done("rollout-0")
    assert answers.result(0) == [2, 4, 6, 8]
    lost = stage.ask([3, 4], 2)
    loading = stage.load(1)
    stage.die("rollout-0")
    stage.die("rollout-0")
    for future in (lost, loading, stage.ask([5], 1), stage.load(2)):
        with pytest.raises(ActorError, match="rollout-0 died"):
            future.result(0)


def test_an_error_in_the_work_fails_its_job_only() -> None:
    stage = Stage(2)
    bad, good = stage.ask([1, 2, 3], 1), stage.ask([4], 1)
    stage.tasks.pop("rollout-0")
    stage.pool.refused("rollout-0", stage.lives["rollout-0"], ValueError("too long"))
    with pytest.raises(ValueError, match="too long"):
        bad.result(0)
    assert stage.given() == {"rollout-0": [4], "rollout-1": [2]}
    stage.done("rollout-1")
    stage.done("rollout-0")
    assert good.result(0) == [8]


def test_an_engine_whose_work_raised_while_it_loaded_loads_again() -> None:
    stage = Stage(1)
    stage.pool.weights = 3
    bad = stage.ask([1], 1)
    stage.tasks.pop("rollout-0")
    stage.pool.refused("rollout-0", stage.lives["rollout-0"], ValueError("half of it"))
    with pytest.raises(ValueError, match="half of it"):
        bad.result(0)
    stage.ask([2], 1)
    assert stage.loads == ["rollout-0 3"] * 2


def test_the_first_failure_is_told_and_reaches_a_job_whose_answers_are_too_few() -> None:
    stage = Stage(1)
    asked = stage.ask([1, 2], 2)
    with pytest.raises(ValueError, match="zip") as odd:
        stage.pool.finished("rollout-0", stage.lives["rollout-0"], [2])
    stage.pool.fail(odd.value)
    stage.pool.fail(ActorError("later"))
    for future in (asked, stage.ask([3], 1)):
        with pytest.raises(ValueError, match="zip"):
            future.result(0)


def test_a_joiner_that_cannot_start_is_done_without() -> None:
    stage = Stage(1)
    answers = stage.ask([1], 1)
    stage.pool.resize(2)
    assert stage.pool.broken("rollout-1", stage.lives["rollout-1"], ActorError("no memory"))
    assert stage.names() == ["rollout-0"]
    stage.done("rollout-0")
    assert answers.result(0) == [2]


def test_where_nobody_works_a_member_that_cannot_start_ends_the_pool() -> None:
    stage = Stage()
    stage.pool.resize(1)
    answers = stage.ask([1], 1)
    assert not stage.pool.broken("rollout-0", stage.lives["rollout-0"], ActorError("no memory"))
    with pytest.raises(ActorError, match="no memory"):
        answers.result(0)


def test_engines_follow_the_queue_within_bounds_and_leave_with_patience() -> None:
    policy = AutoscaleConfig(min=1, max=4, target_queue=2, patience=2)
    assert [wanted_members(n, policy) for n in (0, 1, 2, 3, 8, 99)] == [1, 1, 1, 2, 4, 4]
    stage = Stage(1, autoscale=policy)
    stage.ask(list(range(6)), 1)
    assert stage.names() == ["rollout-0", "rollout-1", "rollout-2"]
    for name in ("rollout-1", "rollout-2"):
        stage.ready(name)
    while stage.tasks:
        stage.done(min(stage.tasks))
    stage.ask([1], 1)
    assert len(stage.names()) == 3  # a single short queue is no reason
    stage.done(min(stage.tasks))
    stage.ask([1], 1)
    assert len(stage.names()) == 1


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_item_is_answered_once(seed: int) -> None:
    import random

    rng = random.Random(seed)
    stage = Stage(2, max_restarts=10**6)
    jobs = []
    version = 0
    for _ in range(400):
        event = rng.random()
        if event < 0.1:
            items = [rng.randrange(1000) for _ in range(rng.randrange(12))]
            jobs.append((items, stage.ask(items, rng.randrange(1, 5))))
        elif event < 0.15:
            version += 1
            stage.load(version)
        elif event < 0.2:
            stage.pool.resize(rng.randrange(1, 5))
        elif event < 0.3 and stage.pool.members:
            stage.die(rng.choice(stage.names()), ready=False)
        elif event < 0.5:
            waiting = [m.name for m in stage.pool.members.values() if m.state == "starting"]
            if waiting:
                stage.ready(rng.choice(waiting))
        elif stage.tasks:
            stage.done(rng.choice(sorted(stage.tasks)))
    for _ in range(2000):
        for member in list(stage.pool.members.values()):
            if member.state == "starting":
                stage.ready(member.name)
        for name in sorted(stage.tasks):
            stage.done(name)
    for items, future in jobs:
        expected = [2 * item for item in items]
        answers = future.result(0)
        assert all(a in (e, None) for a, e in zip(answers, expected, strict=True))
    given_up = sum(a is None for _, future in jobs for a in future.result(0))
    assert given_up == len(stage.pool.set_aside)
    assert {m.weights for m in stage.pool.members.values()} == {version}
    assert not stage.pool.queue
