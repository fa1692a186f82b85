"""Roles that live in one process, each called as if it had actors of its own.

The processes are one `ActorGroup`: what dies together is started, restored and replayed together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ray

from actors.pool import merge_in_order, split_by_cost
from cluster.groups.actor_group import ActorGroup, Submit
from fgaif.pending import Pending, Then
from fgaif.types import Response, Segment, SegmentScores


class RolePart:
    """One role of the processes that hold several; has the calls of an `ActorGroup`.

    Args:
        actor_group: the processes, all of them `actors.shared.SharedActor`.
        role: its name there.
        first_only: only the first process holds it.
    """

    def __init__(self, actor_group: ActorGroup, role: str, *, first_only: bool = False) -> None:
        self._actor_group = actor_group
        self._role = role
        self._count = 1 if first_only else len(actor_group.members)

    def __len__(self) -> int:
        return self._count

    @property
    def recoveries(self) -> list[float]:
        """Seconds that each recovery of the processes took."""
        return self._actor_group.recoveries

    def call(self, submit: Submit, *, keep: bool = False) -> Pending[list[Any]]:
        """Start a call of the role; ``keep`` if it changes its state."""
        return self._actor_group.call(self._to_role(submit), keep=keep, part=self._role)

    def save(self, submit: Submit) -> Pending[list[Any]]:
        """Start a call that writes the role's state to disk."""
        return self._actor_group.save(self._to_role(submit), part=self._role)

    def set_restore_point(self, base: Submit) -> None:
        """After a failure, bring the role back by ``base``."""
        self._actor_group.set_restore_point(self._to_role(base), part=self._role)

    def restore(self, base: Submit) -> Pending[list[Any]]:
        """Replace the role's state by what ``base`` reads."""
        return self._actor_group.restore(self._to_role(base), part=self._role)

    def stop(self) -> None:
        """Stop the processes, and with them the other roles."""
        self._actor_group.stop()

    def _to_role(self, submit: Submit) -> Submit:
        def to_role(actors: Sequence[Any]) -> list[ray.ObjectRef]:
            return submit([_Role(actor, self._role) for actor in actors[: self._count]])

        return to_role


class _Role:
    """Has the methods of one role of a process, as an actor's handle would."""

    def __init__(self, actor: Any, role: str) -> None:
        self._actor, self._role = actor, role

    def __getattr__(self, method: str) -> "_Method":
        # Each role has a thread of its own there: its calls are answered in order.
        call = self._actor.call.options(concurrency_group=self._role)
        return _Method(lambda *arguments: call.remote(self._role, method, *arguments))


class _Method:
    def __init__(self, remote: Callable[..., ray.ObjectRef]) -> None:
        self.remote = remote


class SharedScorers:
    """The reward models of all kinds on the base of every process: each scores a share."""

    def __init__(self, part: RolePart) -> None:
        self._part = part

    def score(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> Pending[list[SegmentScores]]:
        """Class probabilities (S, K, C) of each response's segments."""
        items = list(zip(responses, segments, strict=True))
        costs = [float(len(response.token_ids)) for response in responses]
        shares = split_by_cost(costs, len(self._part))

        def submit(actors: Sequence[Any]) -> list[ray.ObjectRef]:
            return [
                actor.score_pairs.remote([items[index] for index in indexes])
                for actor, indexes in zip(actors, shares, strict=True)
            ]

        answers = self._part.call(submit)
        return Then(
            lambda: [
                SegmentScores(probs=probs) for probs in merge_in_order(shares, answers.result())
            ]
        )

    def stop(self) -> None:
        """Stop the processes, and with them the other roles."""
        self._part.stop()
