"""The rollout engines as one: an elastic pool over Ray actors.

One thread drives the pool's rules (``actors/pool.py``). Calls of the driver and news of actors
reach it as events of a queue, so the rules need no locks; who waits for answers has a future.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.pool import ElasticPool, Replica, Task
from cluster.groups.actor_group import FailureDetector
from cluster.groups.failures import CREATION, cause_of_death, is_gone, translate
from cluster.groups.placed_actor import node_of
from cluster.roles import Probe, SyncCheck
from cluster.weight_sync import check_load
from fgaif.config import ClusterConfig
from fgaif.errors import ActorError, FgaifError, SyncError
from fgaif.pending import Pending, Then
from fgaif.types import GenerationRequest, Prompt, Response, WeightsManifest

log = logging.getLogger(__name__)

Create = Callable[[str], tuple[Any, PlacementGroup]]
"""Starts a named actor in a placement group of its own and returns both."""
Report = Callable[[Sequence[Replica], int, Callable[[int], int | None]], None]
"""Told of members, chunks that wait, and how to make a version of a member's number of weights."""

Method = Callable[[Any], Any]
"""Picks the remote method of an actor that answers a chunk."""

_TICK_S = 1.0
_GLANCE_S = 0.1
_KEPT_WEIGHTS = 4  # versions in the object store: the newest and what asynchronous chunks may want
_QUESTIONS = 8  # chunks of yes/no questions are this much larger: each answer is one token


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """A version in the object store, and the probe that proves its arrival."""

    version: int
    stored: ray.ObjectRef
    probe: Probe | None


class RolloutGroup:
    """All rollout engines as one; engines join, leave and are replaced while it works.

    Args:
        create: starts an engine of the given name.
        cluster: number of engines, size of chunks, time-outs, bounds.
        watch: tells of frozen or hung actors; asked about once a second.
        wished: number of engines that somebody asked for meanwhile, or None.
        report: called about once a second.
    """

    def __init__(
        self,
        create: Create,
        cluster: ClusterConfig,
        *,
        watch: FailureDetector | None = None,
        wished: Callable[[], int | None] = lambda: None,
        report: Report = lambda members, queued, version_of: None,
    ) -> None:
        self._cluster = cluster
        self._transport = _RayTransport(create, self._put, cluster, watch)
        self._wished, self._report = wished, report
        self._followed: int | None = None
        autoscale = cluster.rollout.autoscale
        self._pool = ElasticPool(
            transport=self._transport, max_restarts=cluster.max_restarts, autoscale=autoscale
        )
        self._transport.pool = self._pool
        self._serial = 0
        self._versions: dict[int, int] = {}
        self._version_of = {0: 0}
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        start = cluster.rollout.replicas
        if autoscale:
            start = min(max(start, autoscale.min), autoscale.max)
        self._put(partial(self._pool.resize, start))
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        version: int | None = None,
        chunk: int | None = None,
    ) -> Pending[list[Response | None]]:
        """Sample one response per request, in order; None for one that keeps killing engines.

        ``version`` is the version of the weights to sample with, by default the newest.
        """
        weights = None if version is None else self._versions[version]
        size = chunk or self._cluster.rollout.chunk
        return self._submit(lambda actor: actor.generate, list(requests), size, weights)

    def p_yes(self, prompts: Sequence[Prompt]) -> Pending[list[float]]:
        """Probability of answering yes rather than no, per prompt; NaN where none could be got."""
        # Questions about one image stay together, where its keys and values are shared.
        order = sorted(range(len(prompts)), key=lambda index: prompts[index].image.sha256)
        size = self._cluster.rollout.chunk * _QUESTIONS
        asked = self._submit(
            lambda actor: actor.p_yes, [prompts[index] for index in order], size, None
        )

        def finish() -> list[float]:
            answers = [float("nan")] * len(prompts)
            for index, answer in zip(order, asked.result(), strict=True):
                answers[index] = float("nan") if answer is None else answer
            return answers

        return Then(finish)

    def load_weights(
        self, manifest: WeightsManifest, probe: Probe | None = None
    ) -> Pending[list[SyncCheck]]:
        """Make a version the newest; done when every engine at work has it and passed its checks.

        One copy goes to the object store. Returns what each engine showed; without a probe that is
        how much of the version arrived. Engines that come later load it before they are given work.
        """
        self._serial += 1
        stored = ray.put(manifest)
        weights = _Weights(version=manifest.version, stored=stored, probe=probe)
        self._versions[manifest.version] = self._serial
        self._version_of[self._serial] = manifest.version
        future: Future[None] = Future()
        serial = self._serial

        def begin() -> None:
            self._transport.offer(serial, weights, self._pool.oldest_weights())
            self._pool.load(serial, future)

        self._put(begin)

        def finish() -> list[SyncCheck]:
            future.result()
            return self._transport.checks(serial)

        return Then(finish)

    def resize(self, engines: int) -> None:
        """Grow or shrink to so many engines; takes effect while work goes on."""
        self._put(partial(self._pool.resize, engines))

    def stop(self) -> None:
        """Stop every engine and the thread."""
        self._put(None)
        self._thread.join()
        self._transport.stop_all()

    def _submit(
        self, method: Method, items: list[Any], size: int, weights: int | None
    ) -> Pending[list[Any]]:
        future: Future[list[Any]] = Future()
        self._put(partial(self._pool.submit, method, items, size, future, weights))
        return Then(future.result)

    def _put(self, event: Callable[[], None] | None) -> None:
        self._events.put(event)

    def _run(self) -> None:
        """Handle events until told to stop; whatever goes wrong reaches those who wait."""
        last = glanced = time.monotonic()
        while True:
            try:
                now = time.monotonic()
                if now - glanced >= _GLANCE_S:
                    glanced = now
                    self._transport.find_dead()
                if now - last >= _TICK_S:
                    last = now
                    self._tick(now)
                event = self._events.get(timeout=_GLANCE_S)
                if event is None:
                    return
                event()
            except queue.Empty:
                pass
            except Exception as error:
                self._pool.fail(error)

    def _tick(self, now: float) -> None:
        wished = self._wished()
        if wished is not None and wished != self._followed:
            self._followed = wished
            self._pool.autoscale = None  # who scales by hand decides
            self._pool.resize(wished)
        self._transport.poll(now)
        members = list(self._pool.members.values())
        self._report(members, len(self._pool.queue), self._version_of.get)


class _RayTransport:
    """Starts engines, sends them chunks and reports back by events."""

    def __init__(
        self,
        create: Create,
        put: Callable[[Callable[[], None]], None],
        cluster: ClusterConfig,
        watch: FailureDetector | None,
    ) -> None:
        self._create, self._put, self._cluster, self._watch = create, put, cluster, watch
        self._actors: dict[str, tuple[Any, PlacementGroup]] = {}
        self._since: dict[str, float] = {}
        self._weights: dict[int, _Weights] = {}
        self._checks: dict[int, list[SyncCheck]] = {}
        self._noise: dict[str, float] = {}
        self._loading: dict[str, ray.ObjectRef] = {}
        self._placed: dict[str, float] = {}
        self.pool: ElasticPool

    def offer(self, serial: int, weights: _Weights, oldest: int) -> None:
        """Keep weights for those that load them; let go of what nobody wants any more."""
        self._weights[serial] = weights
        self._checks[serial] = []
        for old in [key for key in self._weights if key < min(oldest, serial - _KEPT_WEIGHTS + 1)]:
            del self._weights[old], self._checks[old]

    def checks(self, serial: int) -> list[SyncCheck]:
        """What engines showed with these weights, or newer ones that they went on to at once."""
        found = [pair for pair in list(self._checks.items()) if pair[0] >= serial]
        return [check for _, checks in found for check in checks]

    def start(self, name: str, life: int) -> None:
        self._since[name] = time.monotonic()
        self._actors[name] = self._create(name)
        actor = self._actors[name][0]
        self._when_done(actor.__ray_ready__.remote(), partial(self._started, name, life))

    def work(self, name: str, life: int, task: Task, load: bool) -> None:
        self._since[name] = time.monotonic()
        actor = self._actors[name][0]
        if load:
            weights = self._weights[task.weights]
            probe = () if weights.probe is None else weights.probe.responses
            self._loading[name] = actor.load_weights.remote(weights.stored, probe)
            self._when_done(self._loading[name], partial(self._loaded, name, life, task))
        if task.job is not None:
            answers = task.job.method(actor).remote(task.items)
            self._when_done(answers, partial(self._finished, name, life, task))

    def stop(self, name: str, life: int) -> None:
        self._loading.pop(name, None)
        self._noise.pop(name, None)
        self._placed.pop(name, None)
        actor, group = self._actors.pop(name)
        ray.kill(actor)
        remove_placement_group(group)
        if self._watch:
            self._watch.forget(name)

    def stop_all(self) -> None:
        for name in list(self._actors):
            self.stop(name, 0)

    def poll(self, now: float) -> None:
        """Replace those that hang.

        Raises:
            ActorError: no engine became ready in time.
        """
        members = list(self.pool.members.values())
        starting = [now - self._since[m.name] for m in members if m.state == "starting"]
        nobody_works = len(starting) == len(members) > 0
        if nobody_works and min(starting) > self._cluster.start_timeout_s:
            raise ActorError(
                f"no rollout engine became ready within cluster.start_timeout_s = "
                f"{self._cluster.start_timeout_s:g}: is there room for one? See `ray status`"
            )
        for member in members:
            if member.state == "starting":
                self._check_start(member, now)
                continue
            waited = now - self._since[member.name] if member.task else 0.0
            problem = self._watch.problem(member.name, waited) if self._watch else None
            if waited > self._cluster.call_timeout_s:
                problem = "did not answer within cluster.call_timeout_s"
            if problem:
                log.warning("%s %s and is replaced", member.name, problem)
                self.pool.died(member.name, member.life, ActorError(f"{member.name} {problem}"))

    def _check_start(self, member: Replica, now: float) -> None:
        """Replace one that has room but does not get ready; who waits for room may do so."""
        limit = self._cluster.start_timeout_s
        if now - self._since[member.name] <= limit:
            return
        placed = self._placed.get(member.name)
        if placed is None:
            if node_of(self._actors[member.name][1]):
                self._placed[member.name] = now
        elif now - placed > limit:
            late = f"{member.name} did not start within cluster.start_timeout_s = {limit:g}"
            log.warning("%s and is replaced", late)
            self.pool.died(member.name, member.life, ActorError(late))

    def find_dead(self) -> None:
        """Notice the deaths of idle engines, whose answers nobody waits for."""
        for member in list(self.pool.members.values()):
            if member.state != "idle":
                continue
            if error := cause_of_death(self._actors[member.name][0]):
                self._failed(member.name, member.life, error)

    def _when_done(self, reference: ray.ObjectRef, event: Callable[[Any], None]) -> None:
        # The callback runs in a thread of Ray's: it hands over and returns.
        reference.future().add_done_callback(lambda done: self._put(partial(event, done)))

    def _started(self, name: str, life: int, done: "Future[Any]") -> None:
        error = done.exception()
        if error is None:
            self._since[name] = time.monotonic()
            self.pool.started(name, life)
        else:
            self._failed(name, life, error)

    def _loaded(self, name: str, life: int, task: Task, done: "Future[Any]") -> None:
        if not self._at_work(name, life, task):
            return
        try:
            self._confirm(name, task)
        except Exception as error:
            self._failed(name, life, error)
        else:
            if task.job is None:
                self.pool.finished(name, life, [])
            else:
                self.pool.loaded(name, life)

    def _finished(self, name: str, life: int, task: Task, done: "Future[Any]") -> None:
        if not self._at_work(name, life, task):
            return
        try:
            self._confirm(name, task)  # nobody says that the news of loading comes first
            answers = done.result()
        except Exception as error:
            self._failed(name, life, error)
        else:
            self.pool.finished(name, life, answers)

    def _at_work(self, name: str, life: int, task: Task) -> bool:
        """Whether news of the task still counts: its weights may be gone, or loading failed."""
        member = self.pool.living(name, life)
        return member is not None and member.task is task

    def _confirm(self, name: str, task: Task) -> None:
        """Check once what loading the task's weights gave, if it was to load them."""
        call = self._loading.pop(name, None)
        if call is None:
            return
        weights = self._weights[task.weights]
        noise = self._noise.get(name, 0.0)
        check = check_load(name, weights.version, ray.get(call), weights.probe, noise)
        self._noise[name] = check.noise
        self._checks[task.weights].append(check)

    def _failed(self, name: str, life: int, error: BaseException) -> None:
        """Restart after a death; an error that the work itself raised is passed on."""
        assert isinstance(error, Exception)
        if not self.pool.living(name, life):
            return
        # Ray's errors are also of the class of what was raised in the actor.
        ours = isinstance(error, FgaifError) and not isinstance(error, ray.exceptions.RayError)
        cause = error if ours else translate(error, name)
        if isinstance(error, ray.exceptions.ActorDiedError) and CREATION in str(error):
            if self.pool.broken(name, life, cause):
                log.error("%s\nthe run goes on with the other engines", cause)
        elif is_gone(error):
            log.warning("%s\n%s is replaced", cause, name)
            self.pool.died(name, life, cause)
        elif isinstance(cause, SyncError):
            self.pool.fail(cause)  # neither another engine nor another chunk would do better
        else:
            self.pool.refused(name, life, cause)
