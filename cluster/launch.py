"""From the plan to running actors: the only place where a class is made remote."""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import ray
from ray._private import ray_constants
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.deepspeed_setup import free_port
from cluster.groups.actor_group import ActorGroup, RestartLimits
from cluster.groups.placed_actor import PlacedActor, group_name
from cluster.groups.role_groups import (
    JudgeGroup,
    LearnerGroup,
    PreferenceGroup,
    ReferenceGroup,
    RewardGroup,
    StatelessActor,
)
from cluster.groups.rollout_group import RolloutGroup
from cluster.groups.shared_process import RolePart, SharedScorers
from cluster.memory.devices import cluster_devices
from cluster.memory.plan import check_memory
from cluster.monitoring.heartbeat import HeartbeatMonitor, heartbeat_sender, with_heartbeats
from cluster.monitoring.run_monitor import RunMonitor
from cluster.monitoring.status import ActorStatus
from cluster.placement import (
    ROLES,
    Bundle,
    Role,
    check_fits,
    phases,
    plan_roles,
    shared_roles,
)
from fgaif.config import Config
from fgaif.errors import ActorError, ConfigError
from fgaif.interrupts import kept_handlers
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.own_packages import own_packages_first, shadowed
from fgaif.types import Kind

_SLICE_S = 1.0

_SOCKET = "session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""Where Ray puts the socket with the longest name, under its temporary folder."""
_SOCKET_LIMIT = 103 if sys.platform == "darwin" else 107


class Cluster:
    """Connects to Ray, starts roles when they are first asked for, stops them at the end.

    Starting a role returns at once: actors load their models while others work, and calls queue.
    Of ``roles`` alone, room and checkpoints are looked for.
    """

    def __init__(
        self, config: Config, roles: Collection[Role] = ROLES, *, live: bool = False
    ) -> None:
        """``live``: show the run to `fgaif status`, and restart actors whose heartbeats stop."""
        self._config = config
        self._roles = roles
        self._together: tuple[Role, ...] = ()
        self._cluster = config.cluster
        self._pools: dict[str, list[StatelessActor]] = {}
        self._actor_groups: dict[str, ActorGroup] = {}
        self._rollouts: RolloutGroup | None = None
        self._open = ExitStack()
        self._closing = threading.Event()
        self._live = live
        self.live: RunMonitor | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # what was begun is ended if a later part raises
            if not ray.is_initialized():
                stack.callback(ray.shutdown)
                connect(self._config)
            self._bundles = plan_roles(self._config, self._roles)
            self._together = shared_roles(self._config, self._roles)
            check_fits(
                self._bundles, ray.cluster_resources(),
                workers=self._config.reward.workers, phases=phases(self._config),
            )  # fmt: skip
            check_memory(self._config, self._roles, cluster_devices())
            if self._live:
                self.live = RunMonitor(self._config, self._others)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closing.set()
        with self._open as stack:  # each is done whatever those before it raise
            if self.live:
                stack.callback(self.live.close, kind)
            for name in reversed(["rollout", *self._pools, *self._actor_groups]):
                stack.callback(self.stop, name)

    def rollouts(self) -> RolloutGroup:
        """The policy's engines, as many as configured; their number may change at any time."""
        if self._rollouts is None:
            from actors.rollout import RolloutActor

            model = resolve_checkpoint(self._config.policy.model)
            pattern = next(bundle for bundle in self._bundles if bundle.role == "rollout")
            threads = str(self._cluster.threads)

            def create(name: str) -> tuple[Any, PlacementGroup]:
                bundle = replace(pattern, name=name)
                cls = self._with_heartbeats(bundle, RolloutActor)
                return create_actor(bundle, cls, (model, self._config), threads)

            hooks = self.live.hooks() if self.live else {}
            self._rollouts = RolloutGroup(create, self._cluster, **hooks)
        return self._rollouts

    def engines(self) -> int:
        """Rollout engines that there may be now: as scaled by hand, at most, or as configured."""
        settings = self._cluster.rollout
        wished = self.live.watch.wished() if self.live else None
        return wished or (settings.autoscale.max if settings.autoscale else settings.replicas)

    def judges(self, checkpoint: Path | None = None) -> JudgeGroup:
        """Engines of the feedback's verifier, or of another one after that has stopped."""
        from actors.judge import JudgeActor

        name = self._config.feedback.local_verifier
        if checkpoint is not None:
            return JudgeGroup(self._start("judge", "judge", JudgeActor, (checkpoint, self._config)))
        if name is None:
            raise ConfigError(
                f"feedback.verifier = {self._config.feedback.verifier}: names no checkpoint, so "
                "there is no judge to start"
            )
        model = resolve_checkpoint(name)
        return JudgeGroup(self._start("judge", "judge", JudgeActor, (model, self._config)))

    def rewards(self, directory: Path) -> RewardGroup | PreferenceGroup | SharedScorers:
        """The scorers of the trained reward models in ``directory``."""
        if "reward" in self._together:
            assert directory == self._config.run_dir / "rewards"
            return SharedScorers(RolePart(self._processes(), "reward"))
        if self._config.reward.form == "preference":
            from actors.preference import PreferenceActor

            scorer = (directory, self._config)
            only = self._start("reward", "reward", PreferenceActor, scorer)
            return PreferenceGroup(only, len(self._config.kind_names))
        if self._cluster.reward.shared:
            from actors.reward import SharedRewardActor

            scorers = self._start("reward", "reward", SharedRewardActor, (directory, self._config))
            return RewardGroup([scorers], shared=True)
        from actors.reward import RewardActor

        def start(kind: Kind) -> list[StatelessActor]:
            arguments = (directory / kind, self._config)
            return self._start("reward", f"reward-{kind}", RewardActor, arguments)

        return RewardGroup([start(kind) for kind in self._config.kind_names])

    def reference(self, rewards: Path) -> ReferenceGroup:
        """The reference and value actor; ``rewards`` may initialise the value model."""
        if "reference" in self._together:
            return ReferenceGroup(RolePart(self._processes(), "reference", first_only=True))
        from actors.reference import ReferenceActor

        def start(bundles: Sequence[Bundle]) -> list[PlacedActor]:
            arguments = (self._config, rewards)
            return [self._member(bundle, ReferenceActor, arguments) for bundle in bundles]

        return ReferenceGroup(self._actor_group("reference", start))

    def learner(self) -> LearnerGroup:
        """The DeepSpeed ranks. They meet on the node of the first."""
        if "learner" in self._together:
            return LearnerGroup(RolePart(self._processes(), "learner"))
        from actors.learner import LearnerActor

        return LearnerGroup(self._ranks("learner", LearnerActor, (self._config,)))

    def _processes(self) -> ActorGroup:
        """The processes that hold several roles."""
        from actors.shared import SharedActor

        arguments = (self._config, self._together, self._config.run_dir / "rewards")
        return self._ranks("shared", SharedActor, arguments)

    def _ranks(self, role: Role, cls: type, arguments: tuple[Any, ...]) -> ActorGroup:
        """Ranks of a process group; they are also given their number, how many, and the meeting."""

        def start(bundles: Sequence[Bundle]) -> list[PlacedActor]:
            with ExitStack() as undo:  # a group takes along the actors in it
                groups = []
                for bundle in bundles:
                    groups.append(reserve(bundle))
                    undo.callback(remove_placement_group, groups[-1])
                meeting = meeting_point(groups, self._cluster.start_timeout_s, self._closing)
                members = [
                    self._member(bundle, cls, (*arguments, rank, len(groups), *meeting), group)
                    for rank, (bundle, group) in enumerate(zip(bundles, groups, strict=True))
                ]
                undo.pop_all()
            return members

        return self._actor_group(role, start)

    def stop(self, name: str) -> None:
        """Stop the role's actors (``judge``, ``rollout``, ...) if they run, and with a role of a
        shared process all in it."""
        name = "shared" if name in self._together else name
        if name == "rollout" and self._rollouts is not None:
            self._rollouts.stop()
            self._rollouts = None
        for key in [key for key in self._pools if key == name or key.startswith(f"{name}-")]:
            for handle in self._pools.pop(key):
                handle.stop()
        if actor_group := self._actor_groups.pop(name, None):
            actor_group.stop()

    def _start(
        self, role: str, prefix: str, cls: type, arguments: tuple[Any, ...]
    ) -> list[StatelessActor]:
        if prefix not in self._pools:
            self._pools[prefix] = [
                self._launch(bundle, cls, arguments) for bundle in self._planned(role, prefix)
            ]
        return self._pools[prefix]

    def _launch(self, bundle: Bundle, cls: type, arguments: tuple[Any, ...]) -> StatelessActor:
        threads = str(self._cluster.threads)
        create = partial(
            create_actor, bundle, self._with_heartbeats(bundle, cls), arguments, threads
        )
        handle = StatelessActor(bundle.name, create, self._limits(), self._watch())
        if self.live and bundle.role != "judge":  # judges are replaced by those whom they answer
            handle.actor_group.supervise()
        return handle

    def _actor_group(
        self, role: str, start: Callable[[Sequence[Bundle]], list[PlacedActor]]
    ) -> ActorGroup:
        if role not in self._actor_groups:
            bundles = self._planned(role, role)
            self._actor_groups[role] = ActorGroup(
                role, lambda: start(bundles), self._limits(), self._watch()
            )
            if self.live:
                self._actor_groups[role].supervise()
        return self._actor_groups[role]

    def _member(
        self,
        bundle: Bundle,
        cls: type,
        arguments: tuple[Any, ...],
        group: PlacementGroup | None = None,
    ) -> PlacedActor:
        cls = self._with_heartbeats(bundle, cls)
        placed = create_actor(bundle, cls, arguments, str(self._cluster.threads), group)
        return PlacedActor(bundle.name, *placed)

    def _watch(self) -> HeartbeatMonitor | None:
        return self.live.watch if self.live else None

    def _with_heartbeats(self, bundle: Bundle, cls: type) -> type:
        """The class as one that sends heartbeats, in a run that is monitored."""
        if self.live is None:
            return cls
        return with_heartbeats(cls, heartbeat_sender(self._config, bundle.name, bundle.role))

    def _others(self) -> list[ActorStatus]:
        """All actors but rollout engines, for who watches the run; called by another thread."""
        pools = [(key.partition("-")[0], pool) for key, pool in list(self._pools.items())]
        actor_groups = [(role, handle.actor_group) for role, pool in pools for handle in pool]
        return [
            ActorStatus(
                name=member.name,
                role=role,
                state="starting" if member.began() is None else "idle",
                restarts=len(actor_group.recoveries),
            )
            for role, actor_group in [*actor_groups, *list(self._actor_groups.items())]
            for member in list(actor_group.members)
        ]

    def _planned(self, role: str, prefix: str) -> list[Bundle]:
        named = f"{prefix}-"  # with its end: a kind's name may begin another's
        bundles = [b for b in self._bundles if b.role == role and b.name.startswith(named)]
        assert bundles, f"{role} is not among {self._roles}"
        return bundles

    def _limits(self) -> RestartLimits:
        settings = self._cluster
        return RestartLimits(
            call_s=settings.call_timeout_s,
            start_s=settings.start_timeout_s,
            restarts=settings.max_restarts,
        )


def create_actor(
    bundle: Bundle,
    cls: type,
    arguments: tuple[Any, ...],
    threads: str,
    group: PlacementGroup | None = None,
) -> tuple[Any, PlacementGroup]:
    """Start the class in the group, by default a new one, without waiting for either."""
    group = reserve(bundle) if group is None else group
    made: Any = ray.remote(cls)
    if bundle.holds:  # a thread for each role
        made = ray.remote(concurrency_groups=dict.fromkeys(bundle.holds, 1))(cls)
    remote = made.options(
        num_cpus=bundle.cpus,
        num_gpus=bundle.gpus,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "0"}},
    )
    return remote.remote(*arguments), group


def reserve(bundle: Bundle) -> PlacementGroup:
    """Ask for the bundle's resources, without waiting for them."""
    resources = {"CPU": bundle.cpus} | ({"GPU": bundle.gpus} if bundle.gpus else {})
    return placement_group([resources], name=group_name(bundle.name))


def meeting_point(
    groups: Sequence[PlacementGroup], timeout_s: float, closing: threading.Event
) -> tuple[str, int]:
    """Address of the first group's node, and a port that is free there; one alone needs neither.

    Raises:
        ActorError: no node has had room for the first group for so long, or before ``closing``.
    """
    if len(groups) == 1:
        return "", 0
    place = PlacementGroupSchedulingStrategy(placement_group=groups[0])
    asked = ray.remote(_address).options(num_cpus=0, scheduling_strategy=place).remote()
    end = time.monotonic() + timeout_s
    while not ray.wait([asked], timeout=_SLICE_S)[0]:
        if closing.is_set():
            raise ActorError("learner-0 was stopped before it had room")
        if time.monotonic() > end:
            raise ActorError(
                "learner-0: no node had room for it within cluster.start_timeout_s = "
                f"{timeout_s:g}; see `ray status`"
            )
    found: tuple[str, int] = ray.get(asked)
    return found


def _address() -> tuple[str, int]:
    return ray.util.get_node_ip_address(), free_port()


def check_socket_path(folder: str) -> None:
    """Refuse a temporary folder under which the names of Ray's sockets would be too long.

    Raises:
        ConfigError: the system's limit would be passed; names the variable to set.
    """
    length = len(os.fsencode(str(Path(folder) / "ray" / _SOCKET)))
    if length > _SOCKET_LIMIT:
        raise ConfigError(
            f"Ray's sockets would lie {length} bytes deep in {folder}, more than the system's "
            f"{_SOCKET_LIMIT}: set RAY_TMPDIR to a shorter folder, for example RAY_TMPDIR=/tmp"
        )


def connect(config: Config) -> None:
    """Join the configured or surrounding Ray cluster, else start a local one."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {}
    if not address:
        settings = {"num_cpus": config.cluster.local_cpus, "include_dashboard": False}
        check_socket_path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if shadowed(Path.cwd()):  # workers look there first; only then is a slower start worth it
        hook = f"{own_packages_first.__module__}.{own_packages_first.__name__}"
        settings["runtime_env"] = {"worker_process_setup_hook": hook}
    with kept_handlers(), nullcontext() if address else _on_loopback():
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **settings)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Give the node that is started 127.0.0.1, as Ray does on desktops: with any other address its
    store, agents, workers and metrics listen on all interfaces. ``_node_ip_address`` cannot say so:
    Ray replaces it by the machine's address.
    """
    clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
