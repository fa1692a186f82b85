"""Heartbeats by the store's clock, what the driver makes of them, and what it publishes."""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import ray

from actors import progress
from actors.pool import Replica, Task
from cluster.monitoring.heartbeat import (
    Heartbeat,
    HeartbeatMonitor,
    HeartbeatStore,
    StoreView,
    log_to,
    store_name,
)
from cluster.monitoring.status import (
    ActorStatus,
    HeartbeatSeen,
    RunStatus,
    StatusPublisher,
    read_run_address,
    read_status,
)
from fgaif.config import ClusterConfig, Config, load_config
from fgaif.errors import DataError
from fgaif.types import StepReport


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def heartbeat(count: int = 0, name: str = "rollout-0", pid: int = 7) -> Heartbeat:
    return Heartbeat(name=name, role="rollout", node="10.0.0.1", pid=pid, count=count, rss=1000)


def seen(age_s: float = 0.0, still_s: float = 0.0) -> HeartbeatSeen:
    return HeartbeatSeen(node="10.0.0.1", pid=7, rss=1000, rate=5.0, age_s=age_s, still_s=still_s)


def settings(folder: Path) -> Config:
    return load_config(None, [f"dir={folder}", "name=mine", "ppo.steps=5"])


def test_progress_is_a_sum_of_beats() -> None:
    before = progress.count()
    progress.advance()
    progress.advance(5)
    assert progress.count() - before == 6


def test_ages_and_rates_are_by_the_store_s_clock() -> None:
    """40 tokens in 10 s after the first sign, then 3 s of silence: 4 tokens a second."""
    clock = Clock()
    store = HeartbeatStore(clock)
    store.post(heartbeat(count=10))
    clock.now += 5
    store.post(heartbeat(count=50))
    clock.now += 5
    store.post(heartbeat(count=50))
    clock.now += 3
    found = store.view().heartbeats["rollout-0"]
    assert (found.age_s, found.still_s, found.rate) == (3, 8, 4)
    assert (found.node, found.pid, found.rss) == ("10.0.0.1", 7, 1000)


def test_rates_forget_what_is_long_past() -> None:
    clock = Clock()
    store = HeartbeatStore(clock)
    for second in range(0, 100, 5):  # 1,000 tokens a second at first, none in the last minute
        store.post(heartbeat(count=min(second, 40) * 1000))
        clock.now += 5
    assert store.view().heartbeats["rollout-0"].rate == 0


def test_late_signs_of_a_process_that_was_replaced_are_not_its_successor_s() -> None:
    clock = Clock()
    store = HeartbeatStore(clock)
    store.post(heartbeat(count=10))
    store.forget("rollout-0")
    store.forget("never-there")
    store.post(heartbeat(count=11))
    assert store.view().heartbeats == {}
    clock.now += 500
    store.post(heartbeat(count=0, pid=8))
    found = store.view().heartbeats["rollout-0"]
    assert (found.pid, found.age_s, found.still_s) == (8, 0, 0)


def test_a_new_process_under_an_old_name_starts_with_a_clean_slate() -> None:
    clock = Clock()
    store = HeartbeatStore(clock)
    store.post(heartbeat(count=1000))
    clock.now += 50
    store.post(heartbeat(count=0, pid=8))
    assert store.view().heartbeats["rollout-0"].still_s == 0
    assert store.view().heartbeats["rollout-0"].rate == 0


class Answers:
    """A store that answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Future[StoreView]] = []
        self.forgotten: list[str] = []

    def ask(self) -> "Future[StoreView]":
        self.asked.append(Future())
        return self.asked[-1]

    def say(self, wished: int | None = None, **heartbeats: HeartbeatSeen) -> None:
        by_name = {name.replace("_", "-"): value for name, value in heartbeats.items()}
        self.asked[-1].set_result(StoreView(heartbeats=by_name, wished=wished))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def watch(answers: Answers, clock: Clock) -> HeartbeatMonitor:
    return HeartbeatMonitor(answers.ask, answers.forgotten.append, ClusterConfig(), clock)


def test_the_driver_asks_once_a_second_and_never_waits(
    watch: HeartbeatMonitor, answers: Answers, clock: Clock
) -> None:
    assert watch.problem("rollout-0", busy_s=5000) is None
    clock.now += 10
    assert watch.wished() is None
    assert len(answers.asked) == 1  # no answer yet: no second question
    answers.say(wished=3, rollout_0=seen())
    assert watch.wished() == 3
    assert len(answers.asked) == 2
    answers.say(wished=4)
    clock.now += 0.5
    assert watch.wished() == 4
    assert len(answers.asked) == 2
    clock.now += 0.5
    watch.wished()
    assert len(answers.asked) == 3


def test_frozen_and_hanging_actors_are_told_from_working_and_idle_ones(
    watch: HeartbeatMonitor, answers: Answers
) -> None:
    watch.heartbeats()
    answers.say(
        frozen=seen(age_s=61),
        quiet=seen(age_s=59, still_s=899),
        hung=seen(age_s=1, still_s=901),
    )
    assert watch.problem("frozen") == "sent no heartbeat for 61 s"
    assert watch.problem("quiet", busy_s=899) is None
    assert watch.problem("hung", busy_s=950) == "made no progress for 901 s"
    assert watch.problem("hung", busy_s=3) is None  # was idle until 3 s ago
    assert watch.problem("hung") is None
    assert watch.problem("starting", busy_s=5000) is None


def test_what_was_asked_before_an_actor_was_replaced_is_not_believed(
    watch: HeartbeatMonitor, answers: Answers, clock: Clock
) -> None:
    watch.heartbeats()
    answers.say(rollout_0=seen(age_s=61))
    clock.now += 1
    assert watch.problem("rollout-0")  # asks again
    watch.forget("rollout-0")
    answers.say(rollout_0=seen(age_s=62))
    assert watch.problem("rollout-0") is None
    assert answers.forgotten == ["rollout-0"]


def test_a_lost_store_stops_nothing_and_is_said_once(
    watch: HeartbeatMonitor, answers: Answers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    watch.heartbeats()
    answers.say(rollout_0=seen(age_s=61))
    clock.now += 1
    assert watch.problem("rollout-0")
    answers.asked[-1].set_exception(ray.exceptions.ActorDiedError())
    for _ in range(3):
        clock.now += 1
        assert watch.problem("rollout-0") is None
    watch.forget("rollout-0")
    assert len(answers.asked) == 2
    assert answers.forgotten == []
    assert caplog.text.count("goes on without heartbeats") == 1


def test_the_store_s_name_is_the_run_folder_s(tmp_path: Path) -> None:
    assert store_name(settings(tmp_path)) == f"run:{tmp_path}/mine"


def report(step: int, **metrics: float) -> StepReport:
    return StepReport(step=step, version=step, metrics=metrics)


def test_steps_are_published_at_once_and_pool_changes_once_a_second(
    tmp_path: Path, clock: Clock
) -> None:
    got: list[RunStatus] = []
    publisher = StatusPublisher(settings(tmp_path), [got.append], clock)
    learner = ActorStatus(name="learner-0", role="learner", state="idle")
    scorer = ActorStatus(name="reward-object", role="reward", state="starting")
    heartbeats = {"rollout-0": seen(age_s=2), "learner-0": seen(still_s=9)}
    publisher.listen(lambda: heartbeats, lambda: [learner, scorer])
    publisher.step(report(1, **{"reward/task": 0.5, "kl/token": float("nan"), "policy/lr": 1.0}))
    chunk = Task(job=None, indexes=(), items=(), weights=2)
    engine = Replica(name="rollout-0", state="busy", weights=2, restarts=1, task=chunk)
    publisher.rollouts([engine], 4, {2: 7}.get)
    assert len(got) == 1
    clock.now += 1
    publisher.rollouts([engine], 3, {2: 7}.get)
    assert len(got) == 2
    last = read_status(tmp_path / "mine")
    assert last == got[-1]
    assert (last.step, last.steps, last.version, last.metrics) == (1, 5, 1, {"reward/task": 0.5})
    assert (last.chunks_waiting, last.chunks_in_flight) == (3, 1)
    states = {"rollout-0": "busy", "learner-0": "busy", "reward-object": "starting"}
    assert {actor.name: actor.state for actor in last.actors} == states
    first = last.actors[0]
    assert (first.state, first.version, first.restarts) == ("busy", 7, 1)
    assert (first.node, first.rss, first.tokens_per_second, first.sign_age_s) == (
        "10.0.0.1", 1000, 5.0, 2,
    )  # fmt: skip
    assert last.actors[2].sign_age_s is None
    heartbeats["learner-0"] = seen(still_s=11)
    publisher.stage("train")
    assert got[-1].stage == "train"
    assert got[-1].actors[1].state == "idle"
    publisher.step(report(2, **{"rollout/stale": 3, "rollout/set_aside": 1}))
    publisher.step(report(3, **{"rollout/stale": 2}))
    publisher.close("ended")
    last = read_status(tmp_path / "mine")
    assert last is not None
    assert (last.step, last.state, last.stale_dropped, last.set_aside) == (3, "ended", 5, 1)


def test_a_status_that_cannot_be_written_is_said_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine").write_text("a file where the folder should be")
    StatusPublisher(settings(tmp_path)).step(report(1))
    assert "status.json: cannot be written" in caplog.text


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    assert read_run_address(tmp_path) is None
    (tmp_path / "live.json").write_text(json.dumps({"adress": "x"}))
    with pytest.raises(DataError, match=r"live\.json: cannot be read"):
        read_run_address(tmp_path)


def test_the_store_gives_the_last_status_with_fresh_heartbeats(
    tmp_path: Path, clock: Clock
) -> None:
    store = HeartbeatStore(clock)
    assert store.status() is None
    publisher = StatusPublisher(settings(tmp_path), [store.put], clock)
    publisher.rollouts([Replica(name="rollout-0"), Replica(name="rollout-1")], 0, lambda _: None)
    store.post(heartbeat())
    store.request_rollouts(2)
    clock.now += 9
    status = store.status()
    assert status is not None
    assert [actor.sign_age_s for actor in status.actors] == [9, None]
    assert status.wished == 2


@pytest.fixture
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before, levels = (
        list(root.handlers),
        {name: logging.getLogger(name).level for name in ("fgaif", "actors", "cluster")},
    )
    yield
    root.handlers[:] = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_root_logger")
def test_a_process_logs_to_a_file_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_to(tmp_path / "logs" / "rollout-0.log")
    logging.getLogger("actors.rollout").info("ready")
    assert "INFO actors.rollout: ready" in (tmp_path / "logs" / "rollout-0.log").read_text()
    (tmp_path / "file").write_text("")
    log_to(tmp_path / "file" / "x.log")
    assert "no log file here" in caplog.text
