"""Actors that share a distributed computation: restarted together, their state restored exactly.

When one actor of a DeepSpeed group dies or hangs, the others may wait for it in a collective for
ever. So all are killed and started anew, restored from the last restore point (a checkpoint, or the
fresh start), and the calls that changed their state since then are made again in order. A call that
had been answered makes the same state again; one that had not gets its answer now. Each call
therefore takes effect exactly once, even where the dead actor had done it and only the answer was
lost. Constructors are seeded and checkpoints hold optimiser and random state, so the new state
equals the old one bitwise, as far as the hardware repeats its sums.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from cluster.groups.failures import cause_of_death, is_gone, never_started, translate
from cluster.groups.placed_actor import PlacedActor
from fgaif.errors import ActorError, FgaifError
from fgaif.pending import Pending, Then

log = logging.getLogger(__name__)

Submit = Callable[[Sequence[Any]], list[ray.ObjectRef]]
"""Starts one call on each of the actors given; made again on fresh actors after a death."""

_SLICE_S = 1.0
_SUPERVISE_S = 0.2
_SYMPTOM_S = 30.0
"""How long an actor's error is held back while others still work: it may be the consequence of
a death in a collective that Ray does not know of yet."""


class FailureDetector(Protocol):
    """Tells from heartbeats whether an actor is frozen or hangs."""

    def problem(self, name: str, busy_s: float = 0.0) -> str | None:
        """What is wrong with an actor that has been at work for so long; None if nothing."""
        ...

    def forget(self, name: str) -> None:
        """The actor was stopped; another one of its name may follow."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimits:
    """Time-outs in seconds of a call and of a start, and the largest number of restarts in a row
    (without an answer in between)."""

    call_s: float
    start_s: float
    restarts: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class _Call:
    submit: Submit
    keep: bool
    references: list[ray.ObjectRef]
    part: str = ""
    answers: list[Any] | None = None
    deaths: int = 0


class _MemberLost(Exception):
    """An actor of the group is dead, frozen or hangs; the text is the first cause."""


class ActorGroup:
    """Makes each call on every actor of the group, and restarts the group when one fails.

    May be used by several threads. Actors may hold several parts of state that are saved each by
    itself (``part``); what dies together is restored and replayed together, in the order of its
    calls.

    Args:
        name: for messages.
        start: starts all members anew, without waiting for them.
        limits: time-outs, and how many restarts in a row are tried.
        watch: asked about once a second about actors at work.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Sequence[PlacedActor]],
        limits: RestartLimits,
        watch: FailureDetector | None = None,
    ) -> None:
        self.name = name
        self.recoveries: list[float] = []
        """Seconds that each recovery took, replay included."""
        self._start = start
        self._limits = limits
        self._watch = watch
        self._lock = threading.RLock()
        self._saving: set[str] = set()
        self._stopped = threading.Event()
        self._supervisor: threading.Thread | None = None
        self._life = 0
        self._failures = 0
        self._inconsistent: FgaifError | None = None
        self._lost: FgaifError | None = None
        self._bases: dict[str, Submit] = {}
        self._replay_log: list[_Call] = []
        self._saved: dict[str, list[_Call]] = {}
        try:
            self.members = start()
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise translate(error, name) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process of the job gets the members and may replace them; calls and watch stay
        here. What it started dies with it, or with ``stop`` here."""
        return _rebuild, (self.name, self._start, self._limits, self.members)

    def call(self, submit: Submit, *, keep: bool = False, part: str = "") -> Pending[list[Any]]:
        """Start a call on every member; ``keep`` if it changes their state.

        Raises (also from the result):
            ActorError: the group failed and may not be restarted any more; names the first cause.
            FgaifError: what the work itself raised, which is no reason for a restart.
        """
        with self._lock:
            if self._lost is not None:
                raise self._lost
            if self._inconsistent is not None:
                self._recover(str(self._inconsistent))
            references = submit([member.actor for member in self.members])
            call = _Call(submit=submit, keep=keep, references=references, part=part)
            self._replay_log.append(call)
        return Then(lambda: self._result(call))

    def save(self, submit: Submit, *, part: str = "") -> Pending[list[Any]]:
        """Start a call that writes the state to disk.

        The calls before it need not be replayed once ``set_restore_point`` names what was written.
        """
        with self._lock:
            before = [call for call in self._replay_log if call.keep and call.part == part]
            call = self.call(submit, part=part)
            self._saving.add(part)

        def finish() -> list[Any]:
            answers = call.result()
            self._saved[part] = before
            return answers

        return Then(finish)

    def set_restore_point(self, base: Submit, *, part: str = "") -> None:
        """After a failure, restore by ``base``, which reads what ``save`` wrote last.

        Only the calls after it are replayed.
        """
        with self._lock:
            saved = self._saved.pop(part, [])
            assert all(call.answers is not None for call in saved), "the checkpoint is not complete"
            self._replay_log = [call for call in self._replay_log if call not in saved]
            self._bases[part] = base
            self._saving.discard(part)

    def restore(self, base: Submit, *, part: str = "") -> Pending[list[Any]]:
        """Replace the present state by what ``base`` reads."""
        with self._lock:
            self._replay_log = [call for call in self._replay_log if call.part != part]
            self._saved.pop(part, None)
            self._bases[part] = base
            self._saving.discard(part)
            return self.call(base, part=part)

    def supervise(self) -> None:
        """Restart the group too when an actor dies while no call is running, in a thread.

        Otherwise the next call finds out, and waits for the restart.
        """
        self._supervisor = threading.Thread(
            target=self._supervise, name=f"{self.name} supervisor", daemon=True
        )
        self._supervisor.start()

    def stop(self) -> None:
        """Kill every actor; none is restarted from now on."""
        self._stopped.set()
        if self._supervisor is not None:
            self._supervisor.join()
        with self._lock:
            self._lost = ActorError(f"{self.name} was stopped")
            self._kill()

    def _result(self, call: _Call) -> list[Any]:
        while True:
            with self._lock:
                if call.answers is not None:
                    return call.answers
                if self._lost is not None:
                    raise self._lost
                life, members, references = self._life, self.members, call.references
            try:
                answers = self._collect(members, references)
            except _MemberLost as gone:
                with self._lock:
                    if self._life == life:  # nobody else has found it out before
                        call.deaths += 1
                        self._recover(str(gone), call.deaths)
            except FgaifError as error:
                with self._lock:
                    self._forget(call)
                    if call.keep or len(members) > 1:
                        # It may have changed half of the state, or left others in a collective.
                        self._inconsistent = error
                raise
            else:
                with self._lock:
                    self._failures = 0
                    call.answers, call.references = answers, []
                    if not call.keep:
                        self._forget(call)

    def _supervise(self) -> None:
        """Restart actors that fail while no call is running, until the group is stopped."""
        said = ""
        while not self._stopped.wait(_SUPERVISE_S):
            with self._lock:
                waited_for = any(call.answers is None for call in self._replay_log)
                if waited_for or self._saving:  # who waits finds it out; the base is about to go
                    continue
                try:
                    if cause := self._failure_while_idle():
                        self._recover(cause)
                except (FgaifError, ray.exceptions.RayError) as error:
                    if str(error) != said:  # whoever calls next is told too
                        log.warning("%s", said := str(error))
                if self._lost is not None:
                    return

    def _failure_while_idle(self) -> str:
        """Why an idle actor is dead or frozen; empty if none is (the lock is held)."""
        for member in self.members:
            if error := cause_of_death(member.actor):
                cause = translate(error, member.name, member.node())
                if never_started(error):
                    raise cause from error  # so would another
                return str(cause)
            try:
                self._check_alive([member], time.monotonic())
            except _MemberLost as gone:
                return str(gone)
        return ""

    def _forget(self, call: _Call) -> None:
        self._replay_log = [other for other in self._replay_log if other is not call]

    def _kill(self) -> None:
        for member in self.members:
            member.stop()
            if self._watch is not None:
                self._watch.forget(member.name)

    def _recover(self, cause: str, deaths: int = 0) -> None:
        """Restart the group, as often as the limits allow (the lock is held)."""
        allowed = self._limits.restarts
        while True:
            failures = max(self._failures + 1, deaths)
            if failures > allowed:
                told = f"\nnot replaced: failure {failures} without an answer in between, with "
                self._lost = ActorError(f"{cause}{told}cluster.max_restarts = {allowed}")
                raise self._lost
            self._failures += 1
            try:
                self._restart_and_replay(
                    f"{cause}\n{self.name} is replaced ({failures} of {allowed})"
                )
            except _MemberLost as again:
                cause = str(again)
            else:
                return

    def _restart_and_replay(self, reason: str) -> None:
        """Kill and start all actors, restore their state and replay (the lock is held)."""
        log.warning("%s", reason)
        begun = time.monotonic()
        self._life += 1
        self._kill()
        try:
            self.members = self._start()
            actors = [member.actor for member in self.members]
            self._collect(self.members, [member.ready for member in self.members], starting=True)
            for base in self._bases.values():
                self._collect(self.members, base(actors))
            for call in self._replay_log:
                call.references = call.submit(actors)
                if call.answers is not None:
                    self._collect(self.members, call.references)
                    call.references = []
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise _MemberLost(str(translate(error, self.name))) from error
        except FgaifError as error:
            self._lost = ActorError(f"{self.name} cannot be brought back: {error}")
            raise self._lost from error
        self._inconsistent = None
        self.recoveries.append(time.monotonic() - begun)
        log.warning("%s is back after %.1f s", self.name, self.recoveries[-1])

    def _collect(
        self,
        members: Sequence[PlacedActor],
        references: list[ray.ObjectRef],
        *,
        starting: bool = False,
    ) -> list[Any]:
        """Wait for everyone's answer, in slices between which the watch is asked.

        Raises:
            _MemberLost: somebody is dead, frozen, hangs or takes too long.
            FgaifError: the work raised.
        """
        answers: list[Any] = [None] * len(references)
        waiting = dict(zip(references, range(len(references)), strict=True))
        begun, raised = time.monotonic(), _Raised()
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_SLICE_S)
            for reference in done:
                index = waiting.pop(reference)
                try:
                    answers[index] = ray.get(reference)
                except (ray.exceptions.RayError, TimeoutError) as error:
                    cause = translate(error, members[index].name, members[index].node())
                    if is_gone(error) and (starting or not never_started(error)):
                        raise _MemberLost(str(cause)) from error
                    raised.add(cause)
            raised.raise_when_sure(bool(waiting))
            if waiting and self._stopped.is_set():
                raise ActorError(f"{self.name} was stopped")
            if waiting:
                self._check_alive([members[index] for index in waiting.values()], begun)
        return answers

    def _check_alive(self, members: Sequence[PlacedActor], begun: float) -> None:
        """Raise _MemberLost if one of those waited for since ``begun`` will not answer."""
        limits = self._limits
        for member in members:
            began = member.began()
            if began is None:
                if member.is_late(limits.start_s):
                    late = f"did not start within cluster.start_timeout_s = {limits.start_s:g}"
                    raise _MemberLost(f"{member.name} {late}")
                continue
            busy = time.monotonic() - max(begun, began)
            problem = self._watch.problem(member.name, busy) if self._watch else None
            if problem is None and busy > limits.call_s:
                problem = (
                    f"did not answer within {limits.call_s:g} s; raise cluster.call_timeout_s if "
                    "the work is that long"
                )
            if problem:
                raise _MemberLost(f"{member.name} {problem}")


def _rebuild(
    name: str,
    start: Callable[[], Sequence[PlacedActor]],
    limits: RestartLimits,
    members: Sequence[PlacedActor],
) -> ActorGroup:
    actor_group = ActorGroup(name, lambda: members, limits)
    actor_group._start = start
    return actor_group


@dataclass(slots=True)
class _Raised:
    """The first error that the work raised; held back while it may follow from another's death."""

    error: FgaifError | None = None
    since: float = field(default_factory=time.monotonic)

    def add(self, error: FgaifError) -> None:
        if self.error is None:
            self.error, self.since = error, time.monotonic()

    def raise_when_sure(self, others_work: bool) -> None:
        if self.error is None:
            return
        ours = not isinstance(self.error, ActorError)
        if ours or not others_work or time.monotonic() - self.since > _SYMPTOM_S:
            raise self.error
