"""Actors that live and die together, and that come back in the state they had.

A team keeps a journal: the calls that changed its state since its base, a checkpoint or the fresh
start, and the calls not answered yet. When a member dies or hangs, its fellows may wait for it in a
collective for ever, so all are killed and started anew. They are brought to the base, and the
journal is played again in order: a call that had been answered makes the same state again, and one
that had not gets its answer now. So each takes effect exactly once, even where the dead had done it
and only the answer was lost. Constructors are seeded and a base holds optimiser and random state,
so the new state is bitwise the old one, as far as the hardware repeats its sums.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from cluster.groups.failures import cause_of_death, is_gone, never_started, translate
from cluster.groups.placed_actor import Member
from fgaif.errors import ActorError, FgaifError
from fgaif.pending import Pending, Then

log = logging.getLogger(__name__)

Submit = Callable[[Sequence[Any]], list[ray.ObjectRef]]
"""Starts one call on each of the actors given; made again on fresh actors after a death."""

_SLICE_S = 1.0
_TEND_S = 0.2
_SYMPTOM_S = 30.0
"""A member whose fellow dies in a collective may raise before Ray knows of the death."""


class Watcher(Protocol):
    """Knows from signs of life whether an actor is frozen or hangs."""

    def problem(self, name: str, busy_s: float = 0.0) -> str | None:
        """What is wrong with an actor that has been at work for so long; None if nothing."""
        ...

    def forget(self, name: str) -> None:
        """The actor was stopped; another one of its name may follow."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds for a call and for a start; failures in a row, without an answer between, that are
    mended."""

    call_s: float
    start_s: float
    restarts: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class _Call:
    submit: Submit
    keep: bool
    references: list[ray.ObjectRef]
    answers: list[Any] | None = None
    deaths: int = 0


class _Gone(Exception):
    """A member is dead, frozen or hangs; the text is the first cause."""


class Team:
    """Calls to all members at once, through their deaths. May be used by several threads.

    Args:
        name: for messages.
        start: starts all members anew, without waiting for them.
        limits: time-outs, and how many failures in a row are mended.
        watch: asked about once a second for members that work.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Sequence[Member]],
        limits: Limits,
        watch: Watcher | None = None,
    ) -> None:
        self.name = name
        self.recoveries: list[float] = []
        """Seconds that each recovery took, replay included."""
        self._start = start
        self._limits = limits
        self._watch = watch
        self._lock = threading.RLock()
        self._saving = False
        self._stopped = threading.Event()
        self._tender: threading.Thread | None = None
        self._life = 0
        self._failures = 0
        self._torn: FgaifError | None = None
        self._lost: FgaifError | None = None
        self._base: Submit | None = None
        self._journal: list[_Call] = []
        self._saved: list[_Call] = []
        try:
            self.members = start()
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise translate(error, name) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process of the job gets the members and may replace them; calls and watch stay
        here. What it started dies with it, or with ``stop`` here."""
        return _elsewhere, (self.name, self._start, self._limits, self.members)

    def call(self, submit: Submit, *, keep: bool = False) -> Pending[list[Any]]:
        """Start a call on every member; ``keep`` if it changes their state.

        Raises (also from the result):
            ActorError: the team cannot be mended any more; the first cause is told.
            FgaifError: what the work itself raised; that is no reason to start anyone again.
        """
        with self._lock:
            if self._lost is not None:
                raise self._lost
            if self._torn is not None:
                self._mend(str(self._torn))
            references = submit([member.actor for member in self.members])
            call = _Call(submit=submit, keep=keep, references=references)
            self._journal.append(call)
        return Then(lambda: self._result(call))

    def save(self, submit: Submit) -> Pending[list[Any]]:
        """Start a call that writes the state; what came before it is what ``settle`` lets go of."""
        with self._lock:
            before = [call for call in self._journal if call.keep]
            call = self.call(submit)
            self._saving = True

        def finish() -> list[Any]:
            answers = call.result()
            self._saved = before
            return answers

        return Then(finish)

    def settle(self, base: Submit) -> None:
        """From now on members are brought back by ``base``, which reads what ``save`` last wrote,
        and by the calls after that."""
        with self._lock:
            assert all(call.answers is not None for call in self._saved), "settled too early"
            self._journal = [call for call in self._journal if call not in self._saved]
            self._saved, self._base, self._saving = [], base, False

    def restore(self, base: Submit) -> Pending[list[Any]]:
        """Give up the present state for what ``base`` reads."""
        with self._lock:
            self._journal, self._saved, self._base, self._saving = [], [], base, False
            return self.call(base)

    def tend(self) -> None:
        """From now on, bring members back that die while nobody waits for an answer of theirs.

        Such deaths would else show with the next call only, which then waits for the start.
        """
        self._tender = threading.Thread(target=self._tend, name=f"{self.name} tender", daemon=True)
        self._tender.start()

    def stop(self) -> None:
        """Kill every member; nobody is replaced from now on."""
        self._stopped.set()
        if self._tender is not None:
            self._tender.join()
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
            except _Gone as gone:
                with self._lock:
                    if self._life == life:  # nobody else has found it out before
                        call.deaths += 1
                        self._mend(str(gone), call.deaths)
            except FgaifError as error:
                with self._lock:
                    self._forget(call)
                    if call.keep or len(members) > 1:
                        # It may have changed half of the state, or left others in a collective.
                        self._torn = error
                raise
            else:
                with self._lock:
                    self._failures = 0
                    call.answers, call.references = answers, []
                    if not call.keep:
                        self._forget(call)

    def _tend(self) -> None:
        """Look after members that have nothing to do, until the team is stopped."""
        said = ""
        while not self._stopped.wait(_TEND_S):
            with self._lock:
                waited_for = any(call.answers is None for call in self._journal)
                if waited_for or self._saving:  # who waits finds it out; the base is about to go
                    continue
                try:
                    if cause := self._bad_news():
                        self._mend(cause)
                except (FgaifError, ray.exceptions.RayError) as error:
                    if str(error) != said:  # whoever calls next is told too
                        log.warning("%s", said := str(error))
                if self._lost is not None:
                    return

    def _bad_news(self) -> str:
        """What became of a member without work that is dead or frozen (the lock is held)."""
        for member in self.members:
            if error := cause_of_death(member.actor):
                cause = translate(error, member.name, member.node())
                if never_started(error):
                    raise cause from error  # so would another
                return str(cause)
            try:
                self._look([member], time.monotonic())
            except _Gone as gone:
                return str(gone)
        return ""

    def _forget(self, call: _Call) -> None:
        self._journal = [other for other in self._journal if other is not call]

    def _kill(self) -> None:
        for member in self.members:
            member.stop()
            if self._watch is not None:
                self._watch.forget(member.name)

    def _mend(self, cause: str, deaths: int = 0) -> None:
        """Start everyone again, within bounds (the lock is held)."""
        allowed = self._limits.restarts
        while True:
            failures = max(self._failures + 1, deaths)
            if failures > allowed:
                told = f"\nnot replaced: failure {failures} without an answer in between, with "
                self._lost = ActorError(f"{cause}{told}cluster.max_restarts = {allowed}")
                raise self._lost
            self._failures += 1
            try:
                self._bring_back(f"{cause}\n{self.name} is replaced ({failures} of {allowed})")
            except _Gone as again:
                cause = str(again)
            else:
                return

    def _bring_back(self, reason: str) -> None:
        """Kill all, start all anew and play the journal (the lock is held)."""
        log.warning("%s", reason)
        begun = time.monotonic()
        self._life += 1
        self._kill()
        try:
            self.members = self._start()
            actors = [member.actor for member in self.members]
            self._collect(self.members, [member.ready for member in self.members], starting=True)
            if self._base is not None:
                self._collect(self.members, self._base(actors))
            for call in self._journal:
                call.references = call.submit(actors)
                if call.answers is not None:
                    self._collect(self.members, call.references)
                    call.references = []
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise _Gone(str(translate(error, self.name))) from error
        except FgaifError as error:
            self._lost = ActorError(f"{self.name} cannot be brought back: {error}")
            raise self._lost from error
        self._torn = None
        self.recoveries.append(time.monotonic() - begun)
        log.warning("%s is back after %.1f s", self.name, self.recoveries[-1])

    def _collect(
        self, members: Sequence[Member], references: list[ray.ObjectRef], *, starting: bool = False
    ) -> list[Any]:
        """Wait for everyone's answer, in slices between which the watch is asked.

        Raises:
            _Gone: somebody is dead, frozen, hangs or takes too long.
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
                        raise _Gone(str(cause)) from error
                    raised.add(cause)
            raised.tell(bool(waiting))
            if waiting and self._stopped.is_set():
                raise ActorError(f"{self.name} was stopped")
            if waiting:
                self._look([members[index] for index in waiting.values()], begun)
        return answers

    def _look(self, members: Sequence[Member], begun: float) -> None:
        """Raise _Gone if one of those waited for since ``begun`` will not answer."""
        limits = self._limits
        for member in members:
            began = member.began()
            if began is None:
                if member.is_late(limits.start_s):
                    late = f"did not start within cluster.start_timeout_s = {limits.start_s:g}"
                    raise _Gone(f"{member.name} {late}")
                continue
            busy = time.monotonic() - max(begun, began)
            problem = self._watch.problem(member.name, busy) if self._watch else None
            if problem is None and busy > limits.call_s:
                problem = (
                    f"did not answer within {limits.call_s:g} s; raise cluster.call_timeout_s if "
                    "the work is that long"
                )
            if problem:
                raise _Gone(f"{member.name} {problem}")


def _elsewhere(
    name: str, start: Callable[[], Sequence[Member]], limits: Limits, members: Sequence[Member]
) -> Team:
    team = Team(name, lambda: members, limits)
    team._start = start
    return team


@dataclass(slots=True)
class _Raised:
    """The first error in the work, told at once unless it may be the echo of a fellow's death."""

    error: FgaifError | None = None
    since: float = field(default_factory=time.monotonic)

    def add(self, error: FgaifError) -> None:
        if self.error is None:
            self.error, self.since = error, time.monotonic()

    def tell(self, others_work: bool) -> None:
        if self.error is None:
            return
        ours = not isinstance(self.error, ActorError)
        if ours or not others_work or time.monotonic() - self.since > _SYMPTOM_S:
            raise self.error
