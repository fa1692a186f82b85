"""N replicas of an engine as one: split work evenly, or hand it out in chunks to whoever is free.

:class:`ElasticPool` holds the rules of a pool whose members come, go and die. It knows neither Ray
nor threads nor clocks: a :class:`Transport` starts members and carries tasks to them, and reports
what became of it. The same rules therefore run on a cluster and in a simulation.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from fgaif.config import AutoscaleConfig

T = TypeVar("T")
State = Literal["starting", "idle", "busy", "leaving"]

_UNKNOWN = -1
"""Weights of a member that did not finish loading: it loads again before it works."""


def split_by_cost(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Assign items to ``parts`` replicas so that their summed costs are close.

    Longest first onto the least loaded replica; deterministic. Returns the item indexes of each
    replica in ascending order; a replica may get none.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        target = loads.index(min(loads))
        shares[target].append(index)
        loads[target] += costs[index]
    return [sorted(share) for share in shares]


def merge_in_order(shares: Sequence[Sequence[int]], results: Sequence[Sequence[T]]) -> list[T]:
    """Put the replicas' results back into the order of the items.

    Raises:
        ValueError: a replica returned another number of results than it had items.
    """
    pairs: list[tuple[int, T]] = []
    for share, answers in zip(shares, results, strict=True):
        pairs += zip(share, answers, strict=True)
    return [answer for _, answer in sorted(pairs, key=lambda pair: pair[0])]


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """Items that were asked for together, and their answers in order; None for one set aside.

    ``method`` says to the transport what members do with the items.
    """

    method: Any
    answers: list[Any]
    missing: int
    future: "Future[list[Any]]"


@dataclass(slots=True, kw_only=True, eq=False)
class Task:
    """A chunk of a job for one member, to be done with weights ``weights``; no items: load only."""

    job: Job | None
    indexes: Sequence[int]
    items: Sequence[Any]
    weights: int
    deaths: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Replica:
    """One replica. ``life`` tells its incarnations apart, so that late news of the dead is known as
    such; ``weights`` is what it has loaded, 0 being the checkpoint."""

    name: str
    state: State = "starting"
    life: int = 0
    weights: int = 0
    task: Task | None = None
    deaths_in_a_row: int = 0
    restarts: int = 0


class Transport(Protocol):
    """Carries the pool's orders out. Every order returns at once; its outcome comes back as
    ``started``, ``loaded``, ``finished`` or ``died`` with the same name and life."""

    def start(self, name: str, life: int) -> None:
        """Start a member; ``started`` follows when it can work."""
        ...

    def work(self, name: str, life: int, task: Task, load: bool) -> None:
        """Load the task's weights first if ``load``, then do it; ``loaded`` may follow and
        ``finished`` does."""
        ...

    def stop(self, name: str, life: int) -> None:
        """Kill a member and free what it holds; nothing follows."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class _Load:
    weights: int
    future: "Future[None]"


@dataclass(slots=True)
class ElasticPool:
    """Rules of the pool: who works on what, who is replaced, who joins and who leaves.

    Chunks are handed out in order to members that are free. A member that holds other weights than
    a chunk wants loads them first; so does one that has just joined. A chunk whose member dies goes
    first to the next one. After two deaths its items go one by one. One that kills by itself goes
    last, so that others are answered between two deaths, and is set aside when it kills again.

    Args:
        transport: carries orders out.
        max_restarts: deaths in a row, without an answer in between, that a member is replaced for.
        autoscale: number of members by the length of the queue; None leaves it to ``resize``.
    """

    transport: Transport
    max_restarts: int
    autoscale: AutoscaleConfig | None = None
    weights: int = 0
    """Newest weights; what the next submitted job is done with, unless it says otherwise."""
    members: dict[str, Replica] = field(default_factory=dict)
    queue: deque[Task] = field(default_factory=deque)
    set_aside: list[Any] = field(default_factory=list)
    failure: Exception | None = None
    """What ended the pool; everything asked for afterwards gets it."""
    _loads: list[_Load] = field(default_factory=list)
    _born: int = 0
    _wanted: list[int] = field(default_factory=list)

    def submit(
        self,
        method: Any,
        items: Sequence[Any],
        chunk: int,
        future: "Future[list[Any]]",
        weights: int | None = None,
    ) -> None:
        """Cut items into chunks of ``chunk`` and queue them; ``future`` gets the answers."""
        if self.failure:
            future.set_exception(self.failure)
            return
        if not items:
            future.set_result([])
            return
        job = Job(method=method, answers=[None] * len(items), missing=len(items), future=future)
        wanted = self.weights if weights is None else weights
        for start in range(0, len(items), chunk):
            indexes = range(start, min(start + chunk, len(items)))
            part = items[start : start + chunk]
            self.queue.append(Task(job=job, indexes=indexes, items=part, weights=wanted))
        if self.autoscale:
            self._follow(self.autoscale)
        self._hand_out()

    def load(self, weights: int, future: "Future[None]") -> None:
        """Make ``weights`` the newest; ``future`` is done when every member at work has them."""
        if self.failure:
            future.set_exception(self.failure)
            return
        self.weights = weights
        self._loads.append(_Load(weights=weights, future=future))
        self._hand_out()
        self._settle_loads()

    def resize(self, size: int) -> None:
        """Grow or shrink; who works finishes first, and those not yet started are let go first."""
        staying = [member for member in self.members.values() if member.state != "leaving"]
        for _ in range(size - len(staying)):
            self._join()
        order = {"starting": 0, "idle": 1, "busy": 2}
        newest_first = sorted(staying, key=lambda member: (order[member.state], -member.life))
        for member in newest_first[: max(0, len(staying) - size)]:
            if member.state == "busy":
                member.state = "leaving"
            else:
                self._remove(member)
        self._settle_loads()

    def started(self, name: str, life: int) -> None:
        """A member can work."""
        if member := self.living(name, life):
            self._feed(member)

    def loaded(self, name: str, life: int) -> None:
        """A member has the weights of its task, at which it is still at work."""
        member = self.living(name, life)
        if member is not None and member.task is not None:
            member.weights = member.task.weights
            self._settle_loads()

    def finished(self, name: str, life: int, answers: Sequence[Any]) -> None:
        """A member has done its task."""
        member = self.living(name, life)
        if member is None:
            return
        task = member.task
        assert task is not None
        if task.job is not None:  # still the member's, so that its job fails if answers are missing
            for index, answer in zip(task.indexes, answers, strict=True):
                task.job.answers[index] = answer
            self._count(task.job, len(answers))
        member.task, member.weights, member.deaths_in_a_row = None, task.weights, 0
        self._feed(member)

    def died(self, name: str, life: int, cause: Exception) -> None:
        """A member died or was killed for hanging: replace it and have its chunk done again."""
        member = self.living(name, life)
        if member is None:
            return
        self.transport.stop(name, life)
        if member.task is not None and member.task.job is not None:
            self._again(member.task)
        if member.state == "leaving":
            del self.members[name]
        elif member.deaths_in_a_row >= self.max_restarts:
            del self.members[name]
            self.fail(cause)
            return
        else:
            self._born += 1
            member.state, member.task, member.weights, member.life = "starting", None, 0, self._born
            member.deaths_in_a_row += 1
            member.restarts += 1
            self.transport.start(name, member.life)
        self._hand_out()

    def refused(self, name: str, life: int, error: Exception) -> None:
        """The work itself raised: its job fails, the member stays."""
        member = self.living(name, life)
        if member is None:
            return
        task, member.task = member.task, None
        if task is not None and task.weights != member.weights:
            member.weights = _UNKNOWN  # it may have loaded them, or half of them
        if task is None or task.job is None:
            self.fail(error)
        else:
            self._fail_job(task.job, error)
        self._feed(member)

    def broken(self, name: str, life: int, cause: Exception) -> bool:
        """A member cannot even start, so neither would another in its place. Go on without it if
        others are at work (True), else nothing can go on."""
        member = self.living(name, life)
        if member is None:
            return True
        if any(other.state != "starting" for other in self.members.values()):
            self._remove(member)
            return True
        self.fail(cause)
        return False

    def fail(self, error: Exception) -> None:
        """Nothing can go on: jobs and loads, waited for or still to come, get the first error."""
        self.failure = error = self.failure or error
        running = [member.task for member in self.members.values() if member.task]
        jobs = {task.job for task in [*self.queue, *running]}
        self.queue.clear()
        for job in jobs:
            if job is not None and not job.future.done():
                job.future.set_exception(error)
        for load in self._loads:
            load.future.set_exception(error)
        self._loads.clear()

    def oldest_weights(self) -> int:
        """The oldest weights that a task still wants."""
        running = [m.task.weights for m in self.members.values() if m.task is not None]
        return min([self.weights, *running, *(task.weights for task in self.queue)])

    def _join(self) -> None:
        taken = set(self.members)
        number = next(n for n in range(len(taken) + 1) if f"rollout-{n}" not in taken)
        self._born += 1
        member = Replica(name=f"rollout-{number}", life=self._born)
        self.members[member.name] = member
        self.transport.start(member.name, member.life)

    def _remove(self, member: Replica) -> None:
        del self.members[member.name]
        self.transport.stop(member.name, member.life)

    def living(self, name: str, life: int) -> Replica | None:
        """The member, unless it has left or been replaced since that life."""
        member = self.members.get(name)
        return member if member is not None and member.life == life else None

    def _hand_out(self) -> None:
        for member in list(self.members.values()):
            if member.state == "idle":
                self._feed(member)

    def _feed(self, member: Replica) -> None:
        """Give a member that is free the next chunk, else the newest weights."""
        if member.state == "leaving":
            self._remove(member)
        elif self.queue:
            self._give(member, self.queue.popleft())
        elif member.weights != self.weights and not self.failure:
            self._give(member, Task(job=None, indexes=(), items=(), weights=self.weights))
        else:
            member.state = "idle"
        self._settle_loads()

    def _give(self, member: Replica, task: Task) -> None:
        member.state, member.task = "busy", task
        self.transport.work(member.name, member.life, task, member.weights != task.weights)

    def _settle_loads(self) -> None:
        """A load is done when some member has the weights and none at work is without."""
        if not self._loads:
            return
        ready = [m.weights for m in self.members.values() if m.state != "starting"]
        for load in [item for item in self._loads if ready and min(ready) >= item.weights]:
            self._loads.remove(load)
            load.future.set_result(None)

    def _again(self, task: Task) -> None:
        task.deaths += 1
        alone = len(task.items) == 1
        if alone and task.deaths >= 2:
            assert task.job is not None
            self.set_aside += task.items
            self._count(task.job, 1)
        elif alone:
            behind = [place for place, other in enumerate(self.queue, 1) if other.job is task.job]
            self.queue.insert(max(behind, default=0), task)
        elif task.deaths >= 2:
            self.queue.extendleft(
                Task(job=task.job, indexes=[i], items=[item], weights=task.weights)
                for i, item in reversed(list(zip(task.indexes, task.items, strict=True)))
            )
        else:
            self.queue.appendleft(task)

    def _count(self, job: Job, answers: int) -> None:
        job.missing -= answers
        if job.missing == 0 and not job.future.done():
            job.future.set_result(job.answers)

    def _fail_job(self, job: Job, error: Exception) -> None:
        self.queue = deque(task for task in self.queue if task.job is not job)
        if not job.future.done():
            job.future.set_exception(error)

    def _follow(self, policy: AutoscaleConfig) -> None:
        recent = [*self._wanted, wanted_members(len(self.queue), policy)]
        self._wanted = recent[-policy.patience :]
        staying = sum(member.state != "leaving" for member in self.members.values())
        most = max(self._wanted)
        if most > staying or (most < staying and len(self._wanted) == policy.patience):
            self.resize(most)


def wanted_members(chunks: int, policy: AutoscaleConfig) -> int:
    """Engines for a queue of so many chunks: ceil(chunks / target_queue) within the bounds."""
    wanted = -(-chunks // policy.target_queue)
    return int(min(max(wanted, policy.min), policy.max))
