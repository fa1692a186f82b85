"""As much of Ray as the groups of actors use, in this process: every actor is a thread.

It starts at once and dies at once, where a process takes a second. The actors' classes die by
``_die`` and wait by ``_sleep``. What a thread cannot show, such as a process that is stopped, needs
Ray: the fixture ``transport`` gives either.
"""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.core.generated.gcs_pb2 import ActorTableData

_news = threading.Condition()


class Killed(BaseException):
    """Ends an actor's thread where a signal would end its process."""


class InThread:
    """Ends and waits as a thread does."""

    killed: threading.Event

    def _die(self) -> None:
        raise Killed

    def _sleep(self, seconds: float) -> None:
        if self.killed.wait(seconds):
            raise Killed


class Reference:
    """The answer to a call, or the error in its place, once there is one."""

    def __init__(self) -> None:
        self.done = False
        self.answer: Any = None
        self.error: Exception | None = None
        self._futures: list[Future[Any]] = []

    def future(self) -> "Future[Any]":
        """Done when there is an answer or an error."""
        future: Future[Any] = Future()
        with _news:
            self._futures.append(future)
            self._tell()
        return future

    def settle(self, answer: Any = None, error: Exception | None = None) -> None:
        """The first answer or error counts."""
        with _news:
            if not self.done:
                self.done, self.answer, self.error = True, answer, error
                self._tell()
                _news.notify_all()

    def _tell(self) -> None:
        while self.done and self._futures:
            future = self._futures.pop()
            if self.error is None:
                future.set_result(self.answer)
            else:
                future.set_exception(self.error)


class FakeActor:
    """An actor in a thread that does one call after the other; without ``room`` it waits."""

    def __init__(self, cls: type, room: bool, arguments: Sequence[Any]) -> None:
        self.killed = threading.Event()
        self._class = type(cls.__name__, (InThread, cls), {"killed": self.killed})
        self._end: Exception = ray.exceptions.ActorDiedError()
        self._calls: queue.SimpleQueue[tuple[Reference, str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._open: list[Reference] = []
        self._lock = threading.Lock()
        if room:
            threading.Thread(target=self._live, args=arguments, daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        method = SimpleNamespace(remote=lambda *arguments: self._call(name, arguments))
        method.options = lambda **options: method
        return method

    def die(self, cause: Exception | None = None) -> None:
        """All calls that have no answer fail, and all to come."""
        with self._lock:
            self._end = cause or self._end
            self.killed.set()
            lost, self._open = self._open, []
        for reference in lost:
            reference.settle(error=self._end)

    def _get_local_state(self) -> int:
        dead, alive = ActorTableData.DEAD, ActorTableData.ALIVE
        return int(dead if self.killed.is_set() else alive)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Reference:
        reference = Reference()
        with self._lock:
            if self.killed.is_set():
                reference.settle(error=self._end)
            else:
                self._open.append(reference)
                self._calls.put((reference, name, arguments))
        return reference

    def _live(self, *arguments: Any) -> None:
        try:
            actor = self._class(*arguments)
            while not self.killed.is_set():
                try:
                    reference, name, given = self._calls.get(timeout=0.05)
                except queue.Empty:
                    continue
                self._answer(actor, reference, name, given)
        except Killed:
            self.die()
        except Exception as error:
            raised = _raised("__init__", error)
            self.die(ray.exceptions.ActorDiedError(cause=raised))

    def _answer(self, actor: Any, reference: Reference, name: str, given: Any) -> None:
        try:
            answer = None if name == "__ray_ready__" else getattr(actor, name)(*given)
        except Exception as error:
            reference.settle(error=_raised(name, error))
        else:
            reference.settle(answer)
        with self._lock:
            self._open = [other for other in self._open if other is not reference]


def _raised(name: str, error: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError(name, f"{type(error).__name__}: {error}", error)


def wait(
    references: Sequence[Reference], *, num_returns: int = 1, timeout: float | None = None
) -> tuple[list[Reference], list[Reference]]:
    """As ``ray.wait``."""
    with _news:
        _news.wait_for(lambda: sum(r.done for r in references) >= num_returns, timeout)
        done = [reference for reference in references if reference.done]
    return done, [reference for reference in references if reference not in done]


def get(reference: Reference) -> Any:
    """As ``ray.get``."""
    wait([reference])
    if reference.error is not None:
        raise reference.error
    return reference.answer


def kill(actor: FakeActor) -> None:
    """As ``ray.kill``."""
    actor.die()


def start(cls: type, cpus: float, *arguments: Any) -> tuple[FakeActor, float]:
    """An actor and, for its placement group, the CPUs that it wants; there are two."""
    return FakeActor(cls, cpus <= 2, arguments), cpus


def placement_group_table(group: float | None = None) -> dict[str, Any]:
    """As Ray's, of a group that ``start`` returned; there are no others."""
    return {} if group is None or group > 2 else {"bundles_to_node_id": {0: "here"}}


def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put this in Ray's place in the groups of actors; returns what they take for Ray."""
    from cluster.groups import actor_group, failures, placed_actor, rollout_group

    fake = SimpleNamespace(
        wait=wait, get=get, kill=kill, put=lambda value: value, exceptions=ray.exceptions
    )
    for module in (actor_group, failures, placed_actor, rollout_group):
        monkeypatch.setattr(module, "ray", fake)
    for module in (placed_actor, rollout_group):
        monkeypatch.setattr(module, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(placed_actor, "placement_group_table", placement_group_table)
    return fake
