"""Actors whose calls can be repeated on a fresh one: one of them, or several that share work."""

from collections.abc import Callable, Sequence
from typing import Any

from ray.util.placement_group import PlacementGroup

from actors.pool import merge_in_order, split_by_cost
from cluster.member import Member
from cluster.team import Limits, Team, Watcher
from fgaif.pending import Pending, Then

Create = Callable[[], tuple[Any, PlacementGroup]]
"""Starts an actor in a placement group of its own and returns both."""


class Handle:
    """A named actor without state that matters; replaced when it dies, as ``limits`` allow."""

    def __init__(
        self, name: str, create: Create, limits: Limits, watch: Watcher | None = None
    ) -> None:
        self.name = name
        self.team = Team(name, lambda: [Member(name, *create())], limits, watch)

    def call(self, method: Callable[[Any], Any], *arguments: Any) -> Pending[Any]:
        """Start ``method(actor).remote(*arguments)``; ``result`` names the actor if it fails."""
        answers = self.team.call(lambda actors: [method(actors[0]).remote(*arguments)])
        return Then(lambda: answers.result()[0])

    def stop(self) -> None:
        """Kill the actor and free its resources."""
        self.team.stop()


class Pool:
    """Replicas of one actor class: split work or ask everyone."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.handles = handles

    def spread(
        self, method: Callable[[Any], Any], items: Sequence[Any], costs: Sequence[float]
    ) -> Pending[Any]:
        """Split the items by cost, call every replica with its share, merge in order."""
        shares = split_by_cost(costs, len(self.handles))
        calls = [
            handle.call(method, [items[index] for index in indexes])
            for handle, indexes in zip(self.handles, shares, strict=True)
        ]
        return Then(lambda: merge_in_order(shares, [call.result() for call in calls]))

    def stop(self) -> None:
        """Stop every replica."""
        for handle in self.handles:
            handle.stop()
