"""Signs of life: every actor's process posts them on the run's board, and the driver looks there.

    actor process: thread -- Sign --> Board (a Ray actor of its own) <-- Look -- Watch: driver
    `fgaif status`, `fgaif scale` ------------^

The board keeps time by its own clock, so clocks of nodes need not agree. It is a help, not a part
of the work: a run whose board is lost goes on without signs of life, and says so once.
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
from cluster.monitoring.status import RunStatus, SignSeen, driver_lives, read_live, read_status
from fgaif.config import ClusterConfig, Config
from fgaif.errors import ActorError, DataError

log = logging.getLogger(__name__)

NAMESPACE = "fgaif"
_PREFIX = "run:"
_RATE_WINDOW_S = 30.0
_LOOK_EVERY_S = 1.0
_ANSWER_WITHIN_S = 10.0
_NAME_FREE_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A sign of life of one process: tokens worked on since it started, resident bytes."""

    name: str
    role: str
    node: str
    pid: int
    count: int
    rss: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the driver reads at once: signs by actor name, and the wished number of engines."""

    signs: dict[str, SignSeen]
    wished: int | None


@dataclass(slots=True, kw_only=True)
class _Track:
    sign: Sign
    seen: float
    moved: float
    counts: deque[tuple[float, int]] = field(default_factory=deque)


class Board:
    """Holds the latest sign of each actor, the run's status, and wishes for its size."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tracks: dict[str, _Track] = {}
        self._gone: set[tuple[str, str, int]] = set()
        self._wished: int | None = None
        self._status: RunStatus | None = None

    def beat(self, sign: Sign) -> None:
        """Note a sign; one that comes late from a process that was replaced is not."""
        if _process(sign) in self._gone:
            return
        now, track = self._clock(), self._tracks.get(sign.name)
        if track is None or _process(track.sign) != _process(sign):
            track = self._tracks[sign.name] = _Track(sign=sign, seen=now, moved=now)
        if sign.count != track.sign.count:
            track.moved = now
        track.sign, track.seen = sign, now
        track.counts.append((now, sign.count))
        while track.counts[0][0] < now - _RATE_WINDOW_S and len(track.counts) > 2:
            track.counts.popleft()

    def forget(self, name: str) -> None:
        """Drop an actor that was stopped; its successor of the same name starts without a sign."""
        if track := self._tracks.pop(name, None):
            self._gone.add(_process(track.sign))

    def look(self) -> Look:
        """All signs, with ages by the board's clock, and the wish."""
        return Look(signs={name: self._seen(t) for name, t in self._tracks.items()},
                    wished=self._wished)  # fmt: skip

    def wish(self, rollouts: int) -> None:
        """Note how many rollout engines somebody wants; the run reads it with its next look."""
        self._wished = rollouts

    def put(self, status: RunStatus) -> None:
        """Replace the run's status."""
        self._status = status

    def status(self) -> RunStatus | None:
        """The run's status with fresh signs; None before the first."""
        return self._status and self._status.with_signs(self.look().signs, self._wished)

    def _seen(self, track: _Track) -> SignSeen:
        now, (first, start) = self._clock(), track.counts[0]
        span = track.seen - first
        return SignSeen(
            node=track.sign.node,
            pid=track.sign.pid,
            rss=track.sign.rss,
            rate=(track.sign.count - start) / span if span > 0 else 0.0,
            age_s=now - track.seen,
            still_s=now - track.moved,
        )


def _process(sign: Sign) -> tuple[str, str, int]:
    return sign.name, sign.node, sign.pid


def board_name(config: Config) -> str:
    """The board's name among Ray's actors: one per run folder."""
    return f"{_PREFIX}{config.run_dir.resolve()}"


def boards(run: str) -> list[str]:
    """Names of the living boards of runs called ``run``, or of all if it is empty."""
    found = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]
    names = [name for name in names if name.startswith(_PREFIX)]
    return [name for name in names if not run or Path(name.removeprefix(_PREFIX)).name == run]


def start_board(config: Config) -> Any:
    """Start the run's board beside its driver: only the node that ends the run takes it along.

    That of a run that has just ended gets time to go away.

    Raises:
        ActorError: another driver works on the same run folder.
    """
    name = board_name(config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    make = ray.remote(Board).options(
        name=name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here
    )
    end = time.monotonic() + _NAME_FREE_WITHIN_S
    while True:
        other, cause = _other_driver(config), None
        if other is None:
            try:
                return make.remote()
            except ValueError as error:  # Ray's word for a name that is taken
                other, cause = f"actor {name!r}", error
        if time.monotonic() > end:
            raise ActorError(
                f"{config.run_dir}: another run works in this folder ({other}); wait for it or "
                "stop it, or give this one another name"
            ) from cause
        time.sleep(0.5)


def _other_driver(config: Config) -> str | None:
    """A driver on this machine that works in the folder, perhaps over a Ray of its own."""
    try:
        live, status = read_live(config.run_dir), read_status(config.run_dir)
    except DataError:  # of another version, or damaged; both will be written anew
        return None
    if live is None or live.pid == os.getpid() or (status and status.state != "running"):
        return None
    return f"process {live.pid}" if driver_lives(live) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What an actor's process needs to send signs of life and to keep a log of its own."""

    name: str
    role: str
    board: str
    every_s: float
    log_file: Path

    def start(self) -> None:
        """Log to the file and send signs from now on, until the process ends."""
        log_to(self.log_file)
        log.info("%s: pid %d, all output in %s", self.name, os.getpid(), _stderr_file())
        threading.Thread(target=self._send, name="pulse", daemon=True).start()

    def _send(self) -> None:
        node, process, board, warned = ray.util.get_node_ip_address(), psutil.Process(), None, False
        while True:
            sign = Sign(
                name=self.name, role=self.role, node=node, pid=process.pid,
                count=count(), rss=process.memory_info().rss,
            )  # fmt: skip
            try:
                board = board or ray.get_actor(self.board, namespace=NAMESPACE)
                ray.get(board.beat.remote(sign), timeout=_ANSWER_WITHIN_S)
            except (ray.exceptions.RayError, ValueError) as error:  # ValueError: no such actor
                board = None
                if not warned:
                    log.warning("%s: no board takes signs of life: %s", self.name, error)
                    warned = True
            time.sleep(self.every_s)


def make_pulse(config: Config, name: str, role: str) -> Pulse:
    """The pulse of the run's actor ``name``."""
    return Pulse(
        name=name,
        role=role,
        board=board_name(config),
        every_s=config.cluster.heartbeat_s,
        log_file=(config.run_dir / "logs" / f"{name}.log").resolve(),
    )


def with_pulse(cls: type, pulse: Pulse) -> type:
    """The class as one that starts ``pulse`` before anything else when it is made."""

    def __init__(self: Any, *arguments: Any) -> None:
        pulse.start()
        super(beating, self).__init__(*arguments)

    beating: Any = type(cls.__name__, (cls,), {"__init__": __init__, "__doc__": cls.__doc__})
    return cast(type, beating)


def log_to(path: Path) -> logging.Handler | None:
    """Write what this process logs to a file too; a folder that cannot be written is said.

    Returns the root logger's new handler, for who wants to take it off again.
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


class Watch:
    """The driver's view of the board: asks at most once a second and never waits for an answer."""

    def __init__(
        self,
        ask: Callable[[], "Future[Look]"],
        forget: Callable[[str], object],
        config: ClusterConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._forget = forget
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._look = Look(signs={}, wished=None)
        self._coming: Future[Look] | None = None
        self._asked = float("-inf")
        self._lost = False

    @classmethod
    def of(cls, board: Any, config: ClusterConfig) -> "Watch":
        """Watch a running board actor."""
        return cls(lambda: board.look.remote().future(), board.forget.remote, config)

    def problem(self, name: str, busy_s: float = 0.0) -> str | None:
        """Say what is wrong with an actor that has started: frozen or hanging; None if nothing.

        ``busy_s`` is how long the actor has been at work without an answer, 0 if it is not: only
        then is progress expected of it.
        """
        seen = self._refreshed().signs.get(name)
        if seen is None:
            return None
        if seen.age_s > self._config.heartbeat_timeout_s:
            return f"gave no sign of life for {seen.age_s:.0f} s"
        still = min(seen.still_s, busy_s)
        if still > self._config.stall_timeout_s:
            return f"made no progress for {still:.0f} s"
        return None

    def signs(self) -> dict[str, SignSeen]:
        """The latest signs by actor name."""
        return self._refreshed().signs

    def wished(self) -> int | None:
        """Rollout engines that ``fgaif scale`` asked for last; None if it never did."""
        return self._refreshed().wished

    def forget(self, name: str) -> None:
        """Drop what is known of an actor that was stopped, before its successor starts."""
        with self._lock:
            self._coming = None  # it was asked for before
            signs = {other: seen for other, seen in self._look.signs.items() if other != name}
            self._look = Look(signs=signs, wished=self._look.wished)
            if not self._lost:
                self._forget(name)

    def _refreshed(self) -> Look:
        with self._lock:
            if self._coming is not None and self._coming.done():
                self._take(self._coming)
                self._coming = None
            due = self._clock() >= self._asked + _LOOK_EVERY_S
            if due and self._coming is None and not self._lost:
                self._asked = self._clock()
                self._coming = self._ask()
            return self._look

    def _take(self, answer: "Future[Look]") -> None:
        try:
            self._look = answer.result()
        except ray.exceptions.RayError as error:
            self._lost = True
            self._look = Look(signs={}, wished=None)
            log.warning("the board is lost, the run goes on without signs of life: %s", error)
