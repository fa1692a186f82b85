"""What a run is doing, as its driver publishes it: to the heartbeat store, a file and metrics."""

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from actors.pool import Replica
from fgaif.config import Config
from fgaif.errors import DataError
from fgaif.files import write_whole
from fgaif.types import StepReport

log = logging.getLogger(__name__)

STATUS = "status.json"
LIVE = "live.json"
AUTH_MODE = "RAY_AUTH_MODE"
_PUBLISH_EVERY_S = 1.0
_JUST_NOW_S = 10.0

ActorState = Literal["starting", "idle", "busy", "leaving"]
RunState = Literal["running", "ended", "failed", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatSeen:
    """An actor's last heartbeat: when it came, when progress was last made, tokens a second."""

    node: str
    pid: int
    rss: int
    rate: float
    age_s: float
    still_s: float


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


M = TypeVar("M", bound=_Message)


class ActorStatus(_Message):
    """One actor; what is None has not been heard yet, or does not apply."""

    name: str
    role: str
    state: ActorState
    restarts: int = 0
    version: int | None = None
    """Weights that a rollout engine has loaded."""
    node: str | None = None
    pid: int | None = None
    rss: int | None = None
    """Resident bytes."""
    tokens_per_second: float | None = None
    """Tokens sampled, scored or trained on, over the last half minute."""
    sign_age_s: float | None = None


class RunStatus(_Message):
    """A run at one moment."""

    run: str
    state: RunState = "running"
    stage: str = ""
    step: int = 0
    steps: int
    version: int = 0
    chunks_waiting: int = 0
    chunks_in_flight: int = 0
    wished: int | None = None
    """Rollout engines that `fgaif scale` asked for."""
    actors: tuple[ActorStatus, ...] = ()
    set_aside: int = 0
    """Prompts that killed engines, and were left out."""
    stale_dropped: int = 0
    """Responses too old to be trained on."""
    metrics: dict[str, float] = {}
    """Reward, KL, tokens and seconds of the last step."""
    updated_at: datetime

    def with_heartbeats(
        self, heartbeats: Mapping[str, HeartbeatSeen], wished: int | None
    ) -> "RunStatus":
        """The status with what the actors' heartbeats say."""
        actors = tuple(
            actor.model_copy(update=_said(actor, heartbeats[actor.name]))
            if actor.name in heartbeats
            else actor
            for actor in self.actors
        )
        return self.model_copy(update={"actors": actors, "wished": wished})


class RunAddress(_Message):
    """How to reach a run while it lives: its Ray cluster, its heartbeat store and its driver."""

    address: str
    """Address of the Ray cluster's GCS, as host:port."""
    namespace: str
    store: str = Field(validation_alias=AliasChoices("store", "board"))
    """Name of the heartbeat store's actor; older versions wrote it as ``board``."""
    job: str
    auth: str = ""
    """The cluster's RAY_AUTH_MODE, empty if it was not set."""
    host: str
    pid: int
    """Of the driver, on ``host``."""
    started_at: datetime


def _said(actor: ActorStatus, seen: HeartbeatSeen) -> dict[str, Any]:
    state = actor.state
    if actor.role != "rollout" and state != "starting":  # nobody keeps a list of their work
        state = "busy" if seen.still_s < _JUST_NOW_S else "idle"
    return {
        "state": state,
        "node": seen.node,
        "pid": seen.pid,
        "rss": seen.rss,
        "tokens_per_second": seen.rate,
        "sign_age_s": seen.age_s,
    }


_SHOWN = ("reward/", "hallu/", "kl/", "seconds/", "tokens_per_second", "sync/")


class StatusPublisher:
    """The driver's side: gathers what changes and publishes it at most once a second.

    Steps and ends are always written. Safe to use from several threads.
    """

    def __init__(
        self,
        config: Config,
        sinks: Sequence[Callable[[RunStatus], object]] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = config.run_dir / STATUS
        self._sinks = sinks
        self._clock = clock
        self._lock = threading.Lock()
        self._engines: Sequence[ActorStatus] = ()
        self._others: Callable[[], Sequence[ActorStatus]] = tuple
        self._last = float("-inf")
        self._heartbeats: Callable[[], Mapping[str, HeartbeatSeen]] = dict
        self._status = RunStatus(run=config.name, steps=config.ppo.steps, updated_at=_now())

    def listen(
        self,
        heartbeats: Callable[[], Mapping[str, HeartbeatSeen]],
        others: Callable[[], Sequence[ActorStatus]],
    ) -> None:
        """Set where heartbeats, and the actors besides rollout engines, are read."""
        self._heartbeats, self._others = heartbeats, others

    def stage(self, name: str) -> None:
        """Publish that a stage of the run begins."""
        with self._lock:
            self._publish(now=True, stage=name)

    def step(self, report: StepReport) -> None:
        """Publish a finished step."""
        shown = {
            name: value
            for name, value in report.metrics.items()
            if name.startswith(_SHOWN) and math.isfinite(value)
        }
        stale, lost = (int(report.metrics.get(f"rollout/{k}", 0)) for k in ("stale", "set_aside"))
        with self._lock:
            self._publish(
                now=True,
                step=report.step,
                version=report.version,
                metrics=shown,
                stale_dropped=self._status.stale_dropped + stale,
                set_aside=self._status.set_aside + lost,
            )

    def rollouts(
        self, members: Sequence[Replica], queued: int, version_of: Callable[[int], int | None]
    ) -> None:
        """Publish the rollout engines and their queue in chunks; called at every change.

        ``version_of`` gives the policy's version for a member's number of weights.
        """
        engines = [
            ActorStatus(
                name=member.name,
                role="rollout",
                state=member.state,
                restarts=member.restarts,
                version=version_of(member.weights),
            )
            for member in members
        ]
        in_flight = sum(member.task is not None for member in members)
        with self._lock:
            self._engines = engines
            self._publish(now=False, chunks_waiting=queued, chunks_in_flight=in_flight)

    def close(self, state: RunState) -> None:
        """Publish how it ended, with the actors as they were last."""
        with self._lock:
            self._engines, self._others = self._status.actors, tuple
            self._publish(now=True, state=state, chunks_waiting=0, chunks_in_flight=0)

    def _publish(self, *, now: bool, **changes: Any) -> None:
        self._status = self._status.model_copy(update=changes)
        if not now and self._clock() < self._last + _PUBLISH_EVERY_S:
            return
        self._last = self._clock()
        everyone = (*self._engines, *self._others())
        status = self._status.model_copy(update={"actors": everyone, "updated_at": _now()})
        self._status = status = status.with_heartbeats(self._heartbeats(), status.wished)
        try:
            write_whole(self._file, status.model_dump_json(indent=2) + "\n")
        except DataError as error:  # a help to who watches, not a part of the work
            log.warning("%s", error)
        for sink in self._sinks:
            sink(status)


def write_run_address(
    config: Config, *, address: str, namespace: str, store: str, job: str
) -> None:
    """Write where the run can be found, for `fgaif status` and `fgaif scale`."""
    live = RunAddress(
        address=address,
        namespace=namespace,
        store=store,
        job=job,
        auth=os.environ.get(AUTH_MODE, ""),
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=_now(),
    )
    write_whole(config.run_dir / LIVE, live.model_dump_json(indent=2) + "\n")


def read_status(run_dir: Path) -> RunStatus | None:
    """The status that the run wrote last; None if it never did. Raises DataError."""
    return _read(run_dir / STATUS, RunStatus)


def read_run_address(run_dir: Path) -> RunAddress | None:
    """Where the run's last driver could be found; None if none ever was. Raises DataError."""
    return _read(run_dir / LIVE, RunAddress)


def driver_is_alive(live: RunAddress) -> bool | None:
    """Whether the run's driver is still there; None where it was on another machine."""
    if live.host != socket.gethostname():
        return None
    return process_lives(live.pid, live.started_at.timestamp())


def process_lives(pid: int, since: float) -> bool:
    """Whether the process that had this number at a time (seconds since the epoch) still runs."""
    try:
        process = psutil.Process(pid)
        # The number of a process that is gone may be that of a younger one by now.
        return process.create_time() <= since and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read(path: Path, kind: type[M]) -> M | None:
    if not path.is_file():
        return None
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it") from error


def _now() -> datetime:
    return datetime.now(UTC)
