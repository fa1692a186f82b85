"""The web application's access to the models: calls of Ray Serve deployments."""

import asyncio
import logging
import sys
from collections.abc import Sequence
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from fgaif.chat.messages import gather_all
from fgaif.config import ServeConfig
from fgaif.errors import CheckpointError
from fgaif.serving.api_errors import invalid, overloaded, unavailable
from fgaif.serving.batcher import Batcher
from fgaif.serving.schema import ModelOut, ModelsResponse, ReloadResponse
from fgaif.serving.scoring import (
    Refused,
    Sampled,
    SampleInput,
    ScoreInput,
    ScoreOutput,
    merge_kinds,
)

_TRIES = 3
_SWAP_S = 0.05
_log = logging.getLogger("fgaif.serve")


class ServeBackend:
    """Calls one scorer of all kinds, or one per kind in their order, and a generator."""

    def __init__(
        self,
        scorers: Sequence[DeploymentHandle],
        generator: DeploymentHandle | None,
        config: ServeConfig,
    ) -> None:
        self._scorers = scorers
        self._batched = [_batcher(scorer, config) for scorer in scorers]
        self._generator = generator
        self._config = config
        self._reloading = asyncio.Lock()

    async def score(self, item: ScoreInput) -> ScoreOutput:
        """Score with one version of all kinds: kinds on both sides of a swap are asked again."""
        for _ in range(_TRIES):
            answers = await gather_all(batched(item) for batched in self._batched)
            parts = [_not_refused(answer) for answer in answers]
            if len({part.version for part in parts}) == 1:
                return merge_kinds(parts) if len(parts) > 1 else parts[0]
            await asyncio.sleep(_SWAP_S)
        raise unavailable()

    async def generate(self, item: SampleInput) -> Sampled:
        """Let the policy answer."""
        if self._generator is None:
            raise invalid("no policy is served here")
        answer = await _call(self._generator.generate, item)
        if isinstance(answer, Refused):
            raise answer.error()
        return answer

    async def models(self) -> ModelsResponse:
        """What the scorers have loaded; the cards of all kinds are known to each."""
        loaded: ModelOut = await _call(self._scorers[0].info)
        return ModelsResponse(models=[loaded], generates=self._generator is not None)

    async def probe(self) -> str:
        """Have every scorer score a probe."""
        versions = await gather_all(_call(scorer.probe) for scorer in self._scorers)
        if len(set(versions)) > 1:
            raise unavailable()
        return versions[0]

    async def reload(self, version: str | None) -> ReloadResponse:
        """Have every replica load what the folder holds, then all swap."""
        async with self._reloading:
            previous = (await self.models()).models[0].version
            try:
                found = await _call(self._scorers[0].found_version)
                if version not in (None, found):
                    raise invalid(f"the folder holds version {found}", "version")
                await self._everywhere("prepare", found)
                replicas = await self._everywhere("activate", found)
            except CheckpointError as error:
                _log.error("reload: %s", error)
                raise invalid(
                    "the folder holds no complete set of reward models that fits; see the log"
                ) from None
        return ReloadResponse(previous=previous, version=found, replicas=replicas)

    async def _everywhere(self, method: str, version: str) -> int:
        calls = [scorer.broadcast(method, version) for scorer in self._scorers]
        limit = self._config.reload_timeout_s
        answers = await gather_all(call.results_async(timeout_s=limit) for call in calls)
        return sum(len(replicas) for replicas in answers)


def _not_refused(answer: ScoreOutput | Refused) -> ScoreOutput:
    if isinstance(answer, Refused):
        raise answer.error()
    return answer


def _batcher(
    scorer: DeploymentHandle, config: ServeConfig
) -> Batcher[ScoreInput, ScoreOutput | Refused]:
    """Calls of a scorer: one for each batch, a batch waiting in the replica while one is scored.

    Autoscaling counts calls, not requests: with it each request is a call of its own, and batches
    form in the replicas alone.
    """
    replicas, batch = config.replicas, config.batch
    size = batch.size if replicas.min == replicas.max else 1
    calls = 2 * replicas.max if size > 1 else sys.maxsize

    async def score(items: list[ScoreInput]) -> Sequence[ScoreOutput | Refused]:
        async with asyncio.timeout(config.timeout_s):
            return await _call(scorer.score, items)

    return Batcher(score, size=size, calls=calls, wait_s=batch.wait_ms / 1e3 if size > 1 else 0.0)


async def _call(method: Any, *arguments: Any) -> Any:
    """Call any replica; one that died meanwhile is replaced by another, once."""
    for last in (False, True):
        response = method.remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise overloaded() from None
        except (ActorDiedError, ActorUnavailableError, DeploymentUnavailableError):
            if last:
                raise unavailable() from None
    raise unavailable()
