"""Named actors in placement groups of their own: called, replaced when dead, sharing work."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.pool import merge_in_order, split_by_cost
from cluster.failures import CREATION, translate
from fgaif.pending import Pending, Then

log = logging.getLogger(__name__)

Create = Callable[[], tuple[Any, PlacementGroup]]
"""Starts an actor in a placement group of its own and returns both."""

_REPLACING = threading.Lock()
"""Several threads may find the same actor dead; one of them replaces it."""


class Handle:
    """A named actor in its own placement group, replaced when it dies if ``restarts`` allow it.

    Only for actors whose calls can be repeated on a fresh one: ``prepare`` brings that to the state
    of the one that died (a rollout engine to its weights version), then the call is made again.
    """

    def __init__(
        self,
        name: str,
        create: Create,
        *,
        timeout_s: float,
        start_timeout_s: float,
        restarts: int = 0,
    ) -> None:
        self.name = name
        self.prepare: Callable[[Any], None] = lambda _: None
        self._create = create
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._restarts_left = restarts
        self.actor, self._group = create()

    def call(self, method: Callable[[Any], Any], *arguments: Any) -> Pending[Any]:
        """Start ``method(actor).remote(*arguments)``; ``result`` names the actor if it fails."""
        actor = self.actor
        reference = method(actor).remote(*arguments)

        def finish() -> Any:
            nonlocal actor, reference
            while True:
                try:
                    return ray.get(reference, timeout=self._timeout_s)
                except (ray.exceptions.RayError, TimeoutError) as error:
                    if not self._replace(actor, error):
                        raise translate(error, self.name) from error
                    actor = self.actor
                    reference = method(actor).remote(*arguments)

        return Then(finish)

    def stop(self) -> None:
        """Kill the actor and free its resources."""
        ray.kill(self.actor)
        remove_placement_group(self._group)

    def _replace(self, dead: Any, error: Exception) -> bool:
        """Start another actor in place of one that died or hangs; False if that would not help."""
        gone = (ray.exceptions.ActorDiedError, ray.exceptions.GetTimeoutError, TimeoutError)
        if not isinstance(error, gone) or CREATION in str(error):
            return False
        with _REPLACING:
            if self.actor is not dead:
                return True  # another call found it out first
            if self._restarts_left == 0:
                return False
            self._restarts_left -= 1
            cause = translate(error, self.name)
            log.warning("%s\n%s is replaced, %d left", cause, self.name, self._restarts_left)
            self.stop()
            self.actor, self._group = self._create()
            try:
                ray.get(self.actor.__ray_ready__.remote(), timeout=self._start_timeout_s)
                self.prepare(self.actor)
            except (ray.exceptions.RayError, TimeoutError) as failed:
                raise translate(failed, self.name) from failed
        return True


class Pool:
    """Replicas of one actor class: split work or ask everyone."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.handles = handles

    def spread(
        self, method: Callable[[Any], Any], items: Sequence[Any], costs: Sequence[float]
    ) -> Pending[Any]:
        """Split the items by cost, call every replica with its share, merge in order."""
        return self.share(method, items, split_by_cost(costs, len(self.handles)))

    def share(
        self, method: Callable[[Any], Any], items: Sequence[Any], shares: Sequence[Sequence[int]]
    ) -> Pending[Any]:
        """Call each replica with the items of its share of indexes, merge in order."""
        calls = [
            handle.call(method, [items[index] for index in indexes])
            for handle, indexes in zip(self.handles, shares, strict=True)
        ]
        return Then(lambda: merge_in_order(shares, [call.result() for call in calls]))

    def everywhere(self, method: Callable[[Any], Any], *arguments: Any) -> Pending[list[Any]]:
        """Call every replica with the same arguments."""
        calls = [handle.call(method, *arguments) for handle in self.handles]
        return Then(lambda: [call.result() for call in calls])

    def stop(self) -> None:
        """Stop every replica."""
        for handle in self.handles:
            handle.stop()
