"""An actor at its place: whether it has started, on which node, and its end."""

import time
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from fgaif.errors import ActorError


class Member:
    """A running actor in a placement group of its own."""

    def __init__(self, name: str, actor: Any, group: PlacementGroup) -> None:
        self.name = name
        self.actor = actor
        self.ready: ray.ObjectRef = actor.__ray_ready__.remote()
        self._group = group
        self._born = time.monotonic()
        self._began: float | None = None

    def began(self) -> float | None:
        """When its constructor had returned, as far as was noticed; None before."""
        if self._began is None and ray.wait([self.ready], timeout=0)[0]:
            self._began = time.monotonic()
        return self._began

    def is_late(self, limit_s: float) -> bool:
        """Whether its constructor takes longer than ``limit_s``.

        Raises:
            ActorError: no node has had room for it for so long; another one would wait too.
        """
        late = time.monotonic() > self._born + limit_s
        if late and not self.node():
            raise ActorError(
                f"{self.name}: no node had room for it within cluster.start_timeout_s = "
                f"{limit_s:g}; see `ray status`"
            )
        return late

    def node(self) -> str:
        """Id of the node that its resources are reserved on; empty if there is none now."""
        return str(placement_group_table(self._group).get("bundles_to_node_id", {}).get(0, ""))

    def stop(self) -> None:
        """Kill it and free its resources, also those reserved on a node that is lost."""
        ray.kill(self.actor)
        remove_placement_group(self._group)
