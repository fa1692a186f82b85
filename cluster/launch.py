"""From the plan to running actors: the only place where a class is made remote."""

import logging
import os
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.pool import merge_in_order, split_by_cost
from cluster.failures import CREATION, translate
from cluster.placement import ROLES, Bundle, Role, check_fits, plan_roles
from fgaif.chat.messages import ChatRequest, Reply
from fgaif.config import Config
from fgaif.errors import ConfigError
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.pending import Pending, Then
from fgaif.types import (
    KINDS,
    Evaluation,
    FloatArray,
    GenerationRequest,
    Kind,
    Prompt,
    Response,
    Segment,
    SegmentScores,
    TrainBatch,
    UpdateReport,
    WeightsManifest,
)

log = logging.getLogger(__name__)

Create = Callable[[], tuple[Any, PlacementGroup]]
"""Starts an actor in a placement group of its own and returns both."""

_REPEATABLE = ("rollout", "reward", "judge")
"""Roles whose calls give the same on a fresh actor: seeded sampling, scoring, yes or no."""

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


class RolloutGroup(Pool):
    """All rollout engines as one."""

    def generate(self, requests: Sequence[GenerationRequest]) -> Pending[list[Response]]:
        """Split by expected length, sample everywhere, return in order."""
        costs = [float(request.max_new_tokens) for request in requests]
        return self.spread(lambda actor: actor.generate, requests, costs)

    def p_yes(self, prompts: Sequence[Prompt]) -> Pending[list[float]]:
        """Split evenly, ask everywhere, return in order."""
        return self.spread(lambda actor: actor.p_yes, prompts, [1.0] * len(prompts))

    def load_weights(self, manifest: WeightsManifest) -> Pending[list[int]]:
        """Send one copy to the object store; every replica loads it, later replacements too."""
        stored = ray.put(manifest)
        for handle in self.handles:
            handle.prepare = lambda actor: ray.get(actor.load_weights.remote(stored))
        return self.everywhere(lambda actor: actor.load_weights, stored)

    def probe_logprobs(self, responses: Sequence[Response]) -> Pending[list[list[FloatArray]]]:
        """Score the same responses on every replica."""
        return self.everywhere(lambda actor: actor.probe_logprobs, responses)


class JudgeGroup(Pool):
    """All verifier engines as one."""

    def answer(self, requests: Sequence[ChatRequest]) -> Pending[list[Reply | None]]:
        """Split by length of the answer, ask everywhere, return in order."""
        costs = [1.0 if request.yes_no else float(request.max_tokens) for request in requests]
        return self.spread(lambda actor: actor.answer, requests, costs)


class RewardGroup:
    """One actor (or several) per kind; scores of the kinds are stacked to (S, K, C)."""

    def __init__(self, handles: Sequence[Sequence[Handle]]) -> None:
        self._kinds = [Pool(replicas) for replicas in handles]

    def score(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> Pending[list[SegmentScores]]:
        """Score every kind at the same time."""
        items = list(zip(responses, segments, strict=True))
        costs = [float(len(response.token_ids)) for response in responses]
        calls = [
            group.spread(lambda actor: actor.score_pairs, items, costs) for group in self._kinds
        ]

        def finish() -> list[SegmentScores]:
            kinds = [call.result() for call in calls]
            return [
                SegmentScores(probs=np.stack(rows, axis=1)) for rows in zip(*kinds, strict=True)
            ]

        return Then(finish)

    def stop(self) -> None:
        """Stop every scorer."""
        for group in self._kinds:
            group.stop()


class ReferenceClient:
    """The reference and value actor."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def evaluate(self, responses: Sequence[Response]) -> Pending[list[Evaluation]]:
        """Reference log-probs and values."""
        return self._handle.call(lambda actor: actor.evaluate, responses)

    def update_values(self, batch: TrainBatch) -> Pending[UpdateReport]:
        """Train the value model."""
        return self._handle.call(lambda actor: actor.update_values, batch)

    def save(self, path: Path) -> Pending[None]:
        """Write its state."""
        return self._handle.call(lambda actor: actor.save, path)

    def restore(self, path: Path) -> Pending[None]:
        """Read its state."""
        return self._handle.call(lambda actor: actor.restore, path)

    def stop(self) -> None:
        """Stop the actor."""
        self._handle.stop()


class LearnerGroup(Pool):
    """All DeepSpeed ranks as one. Every rank takes part in every call; rank 0 answers for all."""

    def logprobs(self, responses: Sequence[Response]) -> Pending[list[FloatArray]]:
        """Equal counts per rank: under ZeRO-3 every forward pass is a collective."""
        ranks = len(self.handles)
        shares = [list(range(rank, len(responses), ranks)) for rank in range(ranks)]
        return self.share(lambda actor: actor.logprobs, responses, shares)

    def update(self, batch: TrainBatch, anchors: Sequence[Prompt]) -> Pending[UpdateReport]:
        """Every rank takes its share of each minibatch."""
        return self._first(lambda actor: actor.update, ray.put(batch), anchors)

    def publish(self, version: int) -> Pending[WeightsManifest]:
        """Gather the adapter (a collective under ZeRO-3) and number it."""
        return self._first(lambda actor: actor.publish, version)

    def save(self, path: Path) -> Pending[None]:
        """Every rank writes its part."""
        return self._first(lambda actor: actor.save, path)

    def restore(self, path: Path) -> Pending[None]:
        """Every rank reads its part."""
        return self._first(lambda actor: actor.restore, path)

    def save_adapter(self, path: Path) -> Pending[None]:
        """Write the adapter as a PEFT directory."""
        return self._first(lambda actor: actor.save_adapter, path)

    def _first(self, method: Callable[[Any], Any], *arguments: Any) -> Pending[Any]:
        everyone = self.everywhere(method, *arguments)
        return Then(lambda: everyone.result()[0])


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
        self._owns_ray = False

    def __enter__(self) -> Self:
        if not ray.is_initialized():
            self._owns_ray = True
            connect(self._config)
        self._bundles = plan_roles(self._config, self._roles)
        check_fits(self._bundles, ray.cluster_resources())
        return self

    def __exit__(self, *exc: object) -> None:
        for handles in self._pools.values():
            for handle in handles:
                handle.stop()
        self._pools.clear()
        if self._owns_ray:
            ray.shutdown()

    def rollouts(self) -> RolloutGroup:
        """The policy's engines."""
        from actors.rollout import RolloutActor

        model = resolve_checkpoint(self._config.policy.model)
        return RolloutGroup(
            self._start("rollout", "rollout", lambda _: (RolloutActor, (model, self._config)))
        )

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
        create = partial(_create, bundle, cls, arguments, str(settings.threads))
        restarts = settings.max_restarts if bundle.role in _REPEATABLE else 0
        return Handle(
            bundle.name,
            create,
            timeout_s=settings.call_timeout_s,
            start_timeout_s=settings.start_timeout_s,
            restarts=restarts,
        )


def _create(
    bundle: Bundle, cls: type, arguments: tuple[Any, ...], threads: str
) -> tuple[Any, PlacementGroup]:
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
