"""Heartbeats: every actor's process sends them to the run's store, and the driver reads them there.

    actor process: HeartbeatSender -- Heartbeat --> HeartbeatStore (a Ray actor of its own)
    driver: HeartbeatMonitor <-- StoreView ---------------^
    `fgaif status`, `fgaif scale` ------------------------^

The store keeps time by its own clock, so the nodes' clocks need not agree. The work does not depend
on it: a run that loses its store goes on without heartbeats, and logs that once.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.progress import count
from cluster.monitoring.status import (
    HeartbeatSeen,
    RunStatus,
)
from fgaif.config import ClusterConfig, Config
from fgaif.errors import ActorError

log = logging.getLogger(__name__)

NAMESPACE = "fgaif"
_PREFIX = "run:"
_RATE_WINDOW_S = 30.0
_VIEW_EVERY_S = 1.0
_ANSWER_WITHIN_S = 10.0
_NAME_FREE_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What one process reports: tokens worked on since it started, resident bytes."""

    name: str
    role: str
    node: str
    pid: int
    count: int
    rss: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreView:
    """One read of the store: heartbeats by actor name, and the number of engines asked for."""

    heartbeats: dict[str, HeartbeatSeen]
    wished: int | None


@dataclass(slots=True, kw_only=True)
class _Track:
    heartbeat: Heartbeat
    seen: float
    moved: float
    counts: deque[tuple[float, int]] = field(default_factory=deque)


class HeartbeatStore:
    """Holds each actor's latest heartbeat, the run's status and the number of engines asked for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tracks: dict[str, _Track] = {}
        self._gone: set[tuple[str, str, int]] = set()
        self._wished: int | None = None
        self._status: RunStatus | None = None

    def post(self, heartbeat: Heartbeat) -> None:
        """Keep a heartbeat, unless it comes late from a process that was replaced."""
        if _process(heartbeat) in self._gone:
            return
        now, track = self._clock(), self._tracks.get(heartbeat.name)
        if track is None or _process(track.heartbeat) != _process(heartbeat):
            track = self._tracks[heartbeat.name] = _Track(heartbeat=heartbeat, seen=now, moved=now)
        if heartbeat.count != track.heartbeat.count:
            track.moved = now
        track.heartbeat, track.seen = heartbeat, now
        track.counts.append((now, heartbeat.count))
        while track.counts[0][0] < now - _RATE_WINDOW_S and len(track.counts) > 2:
            track.counts.popleft()

    def forget(self, name: str) -> None:
        """Drop an actor that was stopped; its successor of that name starts without a heartbeat."""
        if track := self._tracks.pop(name, None):
            self._gone.add(_process(track.heartbeat))

    def view(self) -> StoreView:
        """All heartbeats, with ages by the store's clock, and the number of engines asked for."""
        return StoreView(heartbeats={name: self._seen(t) for name, t in self._tracks.items()},
                    wished=self._wished)  # fmt: skip

    def request_rollouts(self, rollouts: int) -> None:
        """Note how many rollout engines are asked for; the run reads it with its next view."""
        self._wished = rollouts

    def put(self, status: RunStatus) -> None:
        """Replace the run's status."""
        self._status = status

    def status(self) -> RunStatus | None:
        """The run's status with fresh heartbeats; None before the first."""
        return self._status and self._status.with_heartbeats(self.view().heartbeats, self._wished)

    def _seen(self, track: _Track) -> HeartbeatSeen:
        now, (first, start) = self._clock(), track.counts[0]
        span = track.seen - first
        return HeartbeatSeen(
            node=track.heartbeat.node,
            pid=track.heartbeat.pid,
            rss=track.heartbeat.rss,
            rate=(track.heartbeat.count - start) / span if span > 0 else 0.0,
            age_s=now - track.seen,
            still_s=now - track.moved,
        )


def _process(heartbeat: Heartbeat) -> tuple[str, str, int]:
    return heartbeat.name, heartbeat.node, heartbeat.pid


def store_name(config: Config) -> str:
    """The store's name among Ray's actors: one per run folder."""
    return f"{_PREFIX}{config.run_dir.resolve()}"


def heartbeat_stores(run: str) -> list[str]:
    """Names of the living stores of runs called ``run``, or of all runs if it is empty."""
    found = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]
    names = [name for name in names if name.startswith(_PREFIX)]
    return [name for name in names if not run or Path(name.removeprefix(_PREFIX)).name == run]


def start_heartbeat_store(config: Config) -> Any:
    """Start the run's heartbeat store on the driver's node, whose loss ends the run anyway.

    The store of a run that has just ended gets time to disappear.

    Raises:
        ActorError: another driver works on the same run folder.
    """
    name = store_name(config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    make = ray.remote(HeartbeatStore).options(
        name=name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here
    )
    end = time.monotonic() + _NAME_FREE_WITHIN_S
    while True:
        try:
            return make.remote()
        except ValueError as error:  # Ray's word for a name that is taken
            if time.monotonic() > end:
                raise ActorError(
                    f"{config.run_dir}: another run works in this folder (actor {name!r}); wait "
                    "for it or stop it, or give this one another name"
                ) from error
        time.sleep(0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatSender:
    """Sends an actor's heartbeats from a thread of its process, and logs to a file of its own."""

    name: str
    role: str
    store: str
    every_s: float
    log_file: Path

    def start(self) -> None:
        """Log to the file and send heartbeats from now on, until the process ends."""
        log_to(self.log_file)
        log.info("%s: pid %d, all output in %s", self.name, os.getpid(), _stderr_file())
        threading.Thread(target=self._send, name="heartbeat", daemon=True).start()

    def _send(self) -> None:
        node, process, store, warned = ray.util.get_node_ip_address(), psutil.Process(), None, False
        while True:
            heartbeat = Heartbeat(
                name=self.name, role=self.role, node=node, pid=process.pid,
                count=count(), rss=process.memory_info().rss,
            )  # fmt: skip
            try:
                store = store or ray.get_actor(self.store, namespace=NAMESPACE)
                ray.get(store.post.remote(heartbeat), timeout=_ANSWER_WITHIN_S)
            except (ray.exceptions.RayError, ValueError) as error:  # ValueError: no such actor
                store = None
                if not warned:
                    log.warning("%s: no heartbeat store can be reached: %s", self.name, error)
                    warned = True
            time.sleep(self.every_s)


def heartbeat_sender(config: Config, name: str, role: str) -> HeartbeatSender:
    """The sender of the run's actor ``name``."""
    return HeartbeatSender(
        name=name,
        role=role,
        store=store_name(config),
        every_s=config.cluster.heartbeat_s,
        log_file=(config.run_dir / "logs" / f"{name}.log").resolve(),
    )


def with_heartbeats(cls: type, sender: HeartbeatSender) -> type:
    """A subclass whose constructor starts ``sender`` before anything else."""

    def __init__(self: Any, *arguments: Any) -> None:
        sender.start()
        super(monitored, self).__init__(*arguments)

    monitored: Any = type(cls.__name__, (cls,), {"__init__": __init__, "__doc__": cls.__doc__})
    return cast(type, monitored)


def log_to(path: Path) -> logging.Handler | None:
    """Also write this process's log to a file; warn if the folder cannot be written.

    Returns the root logger's new handler, so that it can be removed again.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        log.warning("%s: no log file here: %s", path, error.strerror)
        return None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    if not root.handlers and logging.lastResort:  # warnings still go to standard error
        root.addHandler(logging.lastResort)
    root.addHandler(handler)
    for package in ("fgaif", "actors", "cluster"):
        logging.getLogger(package).setLevel(logging.INFO)
    return handler


def _stderr_file() -> str:
    """Where Ray sends this process's standard error, native crashes included."""
    try:
        return os.readlink("/proc/self/fd/2")
    except OSError:
        return "Ray's log folder"


class HeartbeatMonitor:
    """The driver's view of the store: asks at most once a second and never waits for an answer."""

    def __init__(
        self,
        ask: Callable[[], "Future[StoreView]"],
        forget: Callable[[str], object],
        config: ClusterConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._forget = forget
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._view = StoreView(heartbeats={}, wished=None)
        self._coming: Future[StoreView] | None = None
        self._asked = float("-inf")
        self._lost = False

    @classmethod
    def of(cls, store: Any, config: ClusterConfig) -> "HeartbeatMonitor":
        """The monitor of a running store."""
        return cls(lambda: store.view.remote().future(), store.forget.remote, config)

    def problem(self, name: str, busy_s: float = 0.0) -> str | None:
        """Say what is wrong with an actor that has started: frozen or hanging; None if nothing.

        ``busy_s`` is how long the actor has been at work without an answer, 0 if it is not: only
        then is progress expected of it.
        """
        seen = self._refreshed().heartbeats.get(name)
        if seen is None:
            return None
        if seen.age_s > self._config.heartbeat_timeout_s:
            return f"sent no heartbeat for {seen.age_s:.0f} s"
        still = min(seen.still_s, busy_s)
        if still > self._config.stall_timeout_s:
            return f"made no progress for {still:.0f} s"
        return None

    def heartbeats(self) -> dict[str, HeartbeatSeen]:
        """The latest heartbeats by actor name."""
        return self._refreshed().heartbeats

    def wished(self) -> int | None:
        """Rollout engines that ``fgaif scale`` asked for last; None if it never did."""
        return self._refreshed().wished

    def forget(self, name: str) -> None:
        """Drop what is known of an actor that was stopped, before its successor starts."""
        with self._lock:
            self._coming = None  # it was asked for before
            heartbeats = {
                other: seen for other, seen in self._view.heartbeats.items() if other != name
            }
            self._view = StoreView(heartbeats=heartbeats, wished=self._view.wished)
            if not self._lost:
                self._forget(name)

    def _refreshed(self) -> StoreView:
        with self._lock:
            if self._coming is not None and self._coming.done():
                self._take(self._coming)
                self._coming = None
            due = self._clock() >= self._asked + _VIEW_EVERY_S
            if due and self._coming is None and not self._lost:
                self._asked = self._clock()
                self._coming = self._ask()
            return self._view

    def _take(self, answer: "Future[StoreView]") -> None:
        try:
            self._view = answer.result()
        except ray.exceptions.RayError as error:
            self._lost = True
            self._view = StoreView(heartbeats={}, wished=None)
            log.warning(
                "the heartbeat store is lost, the run goes on without heartbeats: %s", error
            )
