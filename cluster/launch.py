"""From the plan to running actors: the only place where a class is made remote."""

import os
import socket
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.handles import Handle
from cluster.placement import ROLES, Bundle, Role, check_fits, plan_roles
from cluster.rollouts import RolloutGroup
from cluster.scorers import JudgeGroup, RewardGroup
from cluster.trained import LearnerGroup, ReferenceClient
from fgaif.config import Config
from fgaif.errors import ConfigError
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.types import KINDS, Kind

_REPEATABLE = ("reward", "judge")
"""Roles whose calls give the same on a fresh actor without further ado."""


class Cluster:
    """Connects to Ray, starts roles when they are first asked for, stops them at the end.

    Starting a role returns at once: actors load their models while others work, and calls queue.
    Of ``roles`` alone, room and checkpoints are looked for.
    """

    def __init__(self, config: Config, roles: Collection[Role] = ROLES) -> None:
        self._config = config
        self._roles = roles
        self._cluster = config.cluster
        self._pools: dict[str, list[Handle]] = {}
        self._rollouts: RolloutGroup | None = None
        self._owns_ray = False

    def __enter__(self) -> Self:
        if not ray.is_initialized():
            self._owns_ray = True
            connect(self._config)
        self._bundles = plan_roles(self._config, self._roles)
        check_fits(self._bundles, ray.cluster_resources())
        return self

    def __exit__(self, *exc: object) -> None:
        for name in ["rollout", *self._pools]:
            self.stop(name)
        if self._owns_ray:
            ray.shutdown()

    def rollouts(self) -> RolloutGroup:
        """The policy's engines, as many as configured; their number may change at any time."""
        if self._rollouts is None:
            from actors.rollout import RolloutActor

            model = resolve_checkpoint(self._config.policy.model)
            pattern = next(bundle for bundle in self._bundles if bundle.role == "rollout")
            threads = str(self._cluster.threads)

            def create(name: str) -> tuple[Any, PlacementGroup]:
                bundle = replace(pattern, name=name)
                return create_actor(bundle, RolloutActor, (model, self._config), threads)

            self._rollouts = RolloutGroup(create, self._cluster)
        return self._rollouts

    def judges(self) -> JudgeGroup:
        """The verifier's engines."""
        from actors.judge import JudgeActor

        name = self._config.feedback.local_verifier
        if name is None:
            raise ConfigError(
                f"feedback.verifier = {self._config.feedback.verifier}: names no checkpoint, so "
                "there is no judge to start"
            )
        model = resolve_checkpoint(name)
        return JudgeGroup(
            self._start("judge", "judge", lambda _: (JudgeActor, (model, self._config)))
        )

    def rewards(self, directory: Path) -> RewardGroup:
        """The scorers of the trained reward models in ``directory/KIND``."""
        from actors.reward import RewardActor

        def start(kind: Kind) -> list[Handle]:
            arguments = (directory / kind, self._config)
            return self._start("reward", f"reward-{kind}", lambda _: (RewardActor, arguments))

        return RewardGroup([start(kind) for kind in KINDS])

    def reference(self, rewards: Path) -> ReferenceClient:
        """The reference and value actor; ``rewards`` may initialise the value model."""
        from actors.reference import ReferenceActor

        arguments = (self._config, rewards)
        return ReferenceClient(
            self._start("reference", "reference", lambda _: (ReferenceActor, arguments))[0]
        )

    def learner(self) -> LearnerGroup:
        """The DeepSpeed ranks."""
        from actors.learner import LearnerActor

        world = self._cluster.learner.replicas
        address, port = ray.util.get_node_ip_address(), free_port()
        return LearnerGroup(
            self._start(
                "learner",
                "learner",
                lambda rank: (LearnerActor, (self._config, rank, world, address, port)),
            )
        )

    def stop(self, name: str) -> None:
        """Stop the role's actors (``judge``, ``rollout``, ...) if they run."""
        if name == "rollout" and self._rollouts is not None:
            self._rollouts.stop()
            self._rollouts = None
        for key in [key for key in self._pools if key == name or key.startswith(f"{name}-")]:
            for handle in self._pools.pop(key):
                handle.stop()

    def _start(
        self, role: str, prefix: str, make: Callable[[int], tuple[type, tuple[Any, ...]]]
    ) -> list[Handle]:
        if prefix not in self._pools:
            bundles = [b for b in self._bundles if b.role == role and b.name.startswith(prefix)]
            assert bundles, f"{role} is not among {self._roles}"
            self._pools[prefix] = [
                self._launch(bundle, *make(index)) for index, bundle in enumerate(bundles)
            ]
        return self._pools[prefix]

    def _launch(self, bundle: Bundle, cls: type, arguments: tuple[Any, ...]) -> Handle:
        settings = self._cluster
        create = partial(create_actor, bundle, cls, arguments, str(settings.threads))
        restarts = settings.max_restarts if bundle.role in _REPEATABLE else 0
        return Handle(
            bundle.name,
            create,
            timeout_s=settings.call_timeout_s,
            start_timeout_s=settings.start_timeout_s,
            restarts=restarts,
        )


def create_actor(
    bundle: Bundle, cls: type, arguments: tuple[Any, ...], threads: str
) -> tuple[Any, PlacementGroup]:
    """Reserve the bundle and start the class in it, without waiting for either."""
    resources = {"CPU": bundle.cpus} | ({"GPU": bundle.gpus} if bundle.gpus else {})
    group = placement_group([resources], name=bundle.name)
    remote = ray.remote(cls).options(
        num_cpus=bundle.cpus,
        num_gpus=bundle.gpus,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "0"}},
    )
    return remote.remote(*arguments), group


def connect(config: Config) -> None:
    """Join the configured or surrounding Ray cluster, else start a local one."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    local = {} if address else {"num_cpus": config.cluster.local_cpus, "include_dashboard": False}
    ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **local)


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
