"""The service's Ray Serve deployments: plain classes; only ``deploy`` makes deployments of them.

    clients -> api (ingress: checks, limits, page) -> scorer (all kinds on one backbone)
                                                    | scorer-object, -attribute, -relation
                                                    -> generator (the policy, by choice)

Batches form twice (``fgaif/serving/batcher.py``): in the ingress, so that a call between processes
carries a batch and not a request, and in the scorers, over the calls of all ingress replicas.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.serving.backend import ServeBackend
from fgaif.chat.messages import gather_all
from fgaif.config import SCENES_CONFIG, Config, load_config, with_overrides
from fgaif.errors import ActorError, ConfigError, DataError
from fgaif.serving.access import read_serve_key
from fgaif.serving.app import create_app
from fgaif.serving.batcher import Batcher
from fgaif.serving.middleware import log_failure
from fgaif.serving.schema import ModelOut
from fgaif.serving.scoring import Refused, Sampled, SampleInput, ScoreInput, ScoreOutput
from fgaif.types import GenerationRequest, Kind, Prompt

APP = "fgaif"
API = "api"
_STUCK_AFTER = 5
_HEALTH_PERIOD_S = 10.0
_HEALTH_TIMEOUT_S = 60.0
_DRAIN_STEP_S = 0.05
_STARTS = 3
_ROOM = 32
_SPARE = 64
"""Requests beyond the queue that an ingress replica takes in, to refuse them in our own words."""


class ServeArgs(BaseModel):
    """Arguments of ``cluster.serving.deployments:app`` in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rewards: Path
    """Folder with object/, attribute/ and relation/, as `fgaif train-reward` writes them; the same
    path on every node."""
    config: Path | None = None
    """Configuration file; default: the embedded world's settings."""
    set: tuple[str, ...] = ()
    """Overrides such as `serve.batch.size=32`."""
    policy: str | None = None
    """CHECKPOINT or CHECKPOINT+ADAPTER to answer /v1/generate."""
    anonymous: bool = False
    """Serve without a key; for machines that nobody else reaches."""


class ScorerReplica:
    """Serve replica with a scoring actor: batches calls and runs the models in one thread."""

    def __init__(self, rewards: Path, config: Config, kinds: Sequence[Kind]) -> None:
        from actors.scorer import ScoringActor  # torch: not in the ingress

        self._actor = ScoringActor(rewards, config, kinds)
        self._thread = ThreadPoolExecutor(1, "score")
        self._stuck_s = _STUCK_AFTER * config.serve.timeout_s
        self._busy_since: float | None = None
        self._scored = False
        self._batched = Batcher(self._score, size=config.serve.batch.size)

    async def score(self, items: Sequence[ScoreInput]) -> list[ScoreOutput | Refused]:
        """Score items, together with those of other calls that wait."""
        return await gather_all(self._batched(item) for item in items)

    async def _score(self, items: list[ScoreInput]) -> list[ScoreOutput | Refused]:
        self._busy_since = time.monotonic()
        try:
            answers = await self._run(self._actor.score, items)
            self._scored = True
            return answers
        finally:
            self._busy_since = None

    async def probe(self) -> str:
        """Score a built-in item; return the version."""
        return await self._run(self._actor.probe)

    async def info(self) -> ModelOut:
        """What is loaded."""
        return self._actor.info()

    async def found_version(self) -> str:
        """Version in the folder."""
        return await asyncio.to_thread(self._actor.found_version)

    async def prepare(self, version: str) -> None:
        """Load a version beside the present one, which goes on scoring."""
        await asyncio.to_thread(self._actor.prepare, version)

    async def activate(self, version: str) -> None:
        """Score with the prepared version from the next batch on."""
        self._actor.activate(version)

    async def check_health(self) -> None:
        """Score a probe unless real work proves the same; raise if a batch never ends."""
        if self._busy_since is not None:
            if time.monotonic() - self._busy_since > self._stuck_s:
                raise ActorError(f"a batch takes longer than {self._stuck_s:g} s")
        elif not self._scored:
            await self.probe()
        self._scored = False

    async def _run(self, method: Any, *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, method, *arguments)
        except Exception as error:
            log_failure(error)
            # Serve logs messages of errors; that of the cause may hold parts of a request.
            raise ActorError(f"the models failed: {type(error).__name__}") from None


class GeneratorReplica:
    """Serve replica with the policy's vLLM engine."""

    def __init__(self, model: Path, config: Config, adapter: Path | None = None) -> None:
        from actors.rollout import RolloutActor

        self._actor = RolloutActor(model, config)
        if adapter is not None:
            from fgaif.lvlm.weights import manifest_from_adapter

            self._actor.load_weights(manifest_from_adapter(adapter, version=1))
        self._thread = ThreadPoolExecutor(1, "generate")
        self.generate.set_max_batch_size(config.cluster.engine.max_num_seqs)

    @serve.batch(batch_wait_timeout_s=0.01)
    async def generate(self, asked: list[SampleInput]) -> list[Sampled | Refused]:
        """Answer a batch; callers send and get one each."""
        requests = [
            GenerationRequest(
                prompt=Prompt(id="request", image=item.image, text=item.prompt),
                seed=item.seed,
                temperature=item.temperature,
                max_new_tokens=item.max_new_tokens,
                prefix=item.prefix,
            )
            for item in asked
        ]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._answer, requests)

    def _answer(self, requests: list[GenerationRequest]) -> list[Sampled | Refused]:
        try:
            answers = self._actor.generate(requests)
        except DataError:
            if len(requests) > 1:  # one of them is at fault: each by itself
                return [self._answer([request])[0] for request in requests]
            told = "prompt and max_new_tokens do not fit into the policy's context, or bad image"
            return [Refused(field="prompt", message=told)]
        return [
            Sampled(
                text=answer.text, token_ids=tuple(answer.token_ids.tolist()), finish=answer.finish
            )
            for answer in answers
        ]


class Ingress:
    """Serve replica with the web application of ``fgaif/serving/app.py``.

    Raises:
        ConfigError: a key is needed and this process finds none.
    """

    def __init__(
        self,
        config: Config,
        anonymous: bool,
        scorers: Sequence[DeploymentHandle],
        generator: DeploymentHandle | None,
    ) -> None:
        self._config = config
        self._key = read_serve_key(config.serve)
        if self._key is None and not anonymous:
            raise ConfigError(
                f"no API key: set {config.serve.key_env} in the environment of every node, or "
                "serve.key_file; `anonymous: true` serves without one"
            )
        self._backend = ServeBackend(scorers, generator, config.serve)

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._app = create_app(self._backend, self._config, key=self._key)
        return self._app

    async def drain(self) -> int:
        """Refuse new requests and wait for those in work; return how many were left."""
        in_flight = self._app.state.in_flight
        in_flight.draining = True
        end = time.monotonic() + self._config.serve.drain_s
        while (in_flight.requests or in_flight.streams) and time.monotonic() < end:
            await asyncio.sleep(_DRAIN_STEP_S)
        return int(in_flight.requests + in_flight.streams)


def app(args: ServeArgs) -> Application:
    """Build the application from the ``args`` of a Serve config file.

    Raises:
        ConfigError: unknown keys or values, with the nearest name.
    """
    return deploy(load_config(args.config or SCENES_CONFIG, args.set), args)


def deploy(config: Config, args: ServeArgs) -> Application:
    """Make every deployment of the service."""
    options = deployment_options(config, args)
    scorers = []
    for name, kinds in scorer_kinds(config).items():
        scorer = serve.deployment(name=name, **options[name])(ScorerReplica)
        scorers.append(scorer.bind(args.rewards, config, kinds))
    generator = None
    if args.policy is not None:
        from fgaif.lvlm.adapters import read_adapter_config
        from fgaif.lvlm.model import split_model

        checkpoint, adapter = split_model(args.policy, "--policy")
        policy = config
        if adapter is not None:  # room for it in the engine
            policy = with_overrides(config, [f"policy.lora.r={read_adapter_config(adapter).r}"])
        made = serve.deployment(name="generator", **options["generator"])(GeneratorReplica)
        generator = made.bind(checkpoint, policy, adapter)
    ingress = serve.deployment(name=API, **options[API])(serve.ingress()(Ingress))
    return ingress.bind(config, args.anonymous, scorers, generator)


def scorer_kinds(config: Config) -> dict[str, tuple[Kind, ...]]:
    """Scoring deployments by name, with the kinds of each."""
    if config.serve.placement == "shared":
        return {"scorer": config.kind_names}
    return {f"scorer-{kind}": (kind,) for kind in config.kind_names}


def deployment_options(config: Config, args: ServeArgs) -> dict[str, dict[str, Any]]:
    """Serve's options of every deployment by name: replicas, resources, queues, health, drain."""
    settings, common = config.serve, {
        "graceful_shutdown_timeout_s": config.serve.drain_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "max_constructor_retry_count": _STARTS,
    }  # fmt: skip
    replicas = settings.replicas
    gpus = config.cluster.reward.gpus if replicas.gpus is None else replicas.gpus
    scaling: dict[str, Any] = {"num_replicas": replicas.min}
    if replicas.min != replicas.max:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "target_ongoing_requests": replicas.target_ongoing,
            }
        }
    scorer = common | scaling | {
        "ray_actor_options": {"num_cpus": replicas.cpus, "num_gpus": gpus},
        # A full replica is asked again only after a pause: room for the next batch, and to wait.
        "max_ongoing_requests": max(2 * settings.batch.size, _ROOM),
        "max_queued_requests": 8 * settings.queue,
    }  # fmt: skip
    options = dict.fromkeys(scorer_kinds(config), scorer)
    options[API] = common | {
        "num_replicas": settings.ingress_replicas,
        "ray_actor_options": {"num_cpus": settings.ingress_cpus},
        "max_ongoing_requests": (
            settings.queue + settings.streams + settings.streams_without_key + _SPARE
        ),
    }
    if args.policy is not None:
        role = config.cluster.rollout
        options["generator"] = common | {
            "ray_actor_options": {"num_cpus": role.cpus, "num_gpus": role.gpus},
            "max_ongoing_requests": 2 * config.cluster.engine.max_num_seqs,
            "max_queued_requests": settings.queue,
        }
    return options
