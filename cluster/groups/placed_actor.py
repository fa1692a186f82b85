"""An actor at its place: whether it has started, on which node, and its end."""

import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group_table,
    remove_placement_group,
)

from fgaif.errors import ActorError


class PlacedActor:
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
        return node_of(self._group)

    def stop(self) -> None:
        """Kill it and free its resources, also those reserved on a node that is lost.

        So are those of an actor that another process of this job has started in its place: it dies
        with that process, but what is reserved for it would stay until the job ends. So no more
        than one other process at a time may replace actors of a name.
        """
        ray.kill(self.actor)
        remove_placement_group(self._group)
        for row in placement_group_table().values():
            if row["state"] != "REMOVED" and row["name"].startswith(_group_prefix(self.name)):
                with suppress(ValueError):  # it has just been removed
                    remove_placement_group(get_placement_group(row["name"]))


def group_name(name: str) -> str:
    """A name for another placement group of the actor ``name``.

    Ray wants names to differ over all jobs of a cluster, and frees those of the dead late.
    """
    return f"{_group_prefix(name)}{uuid4().hex[:8]}"


def _group_prefix(name: str) -> str:
    return f"{name}-{ray.get_runtime_context().get_job_id()}-"


def node_of(group: PlacementGroup) -> str:
    """Id of the node that the group's only bundle is reserved on; empty if there is none now."""
    return str(placement_group_table(group).get("bundles_to_node_id", {}).get(0, ""))
