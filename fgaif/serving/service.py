"""The work of the routes: requests become inputs of the models, their outputs become answers."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from fgaif.chat.messages import gather_all
from fgaif.config import Config
from fgaif.data.images import ImageBytes
from fgaif.serving.api_errors import ApiError, invalid
from fgaif.serving.generation import generate
from fgaif.serving.prometheus import Metrics
from fgaif.serving.request_images import ImageReader
from fgaif.serving.schema import (
    MAX_TEXT_CHARS,
    MAX_TEXTS,
    BatchRequest,
    BatchResponse,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    ModelRef,
    ModelsResponse,
    RankRequest,
    RankResponse,
    ReloadResponse,
    RewardRequest,
    RewardResponse,
    ScoreRequest,
    ScoreResponse,
    TextResult,
    Timing,
)
from fgaif.serving.scoring import Sampled, SampleInput, ScoreInput, ScoreOutput, text_result
from fgaif.types import Kind

_AT_ONCE = 8
"""Items of one request that are with the models at the same time."""

_PROBE_KEPT_S = 2.0
_PROBE_LIMIT_S = 10.0


class Backend(Protocol):
    """The models behind the routes; each method raises ApiError where it cannot answer."""

    async def score(self, item: ScoreInput) -> ScoreOutput:
        """Score an item with one version of all kinds."""

    async def generate(self, item: SampleInput) -> Sampled:
        """Let the policy answer; 422 where none is served."""

    async def models(self) -> ModelsResponse:
        """What is loaded."""

    async def reload(self, version: str | None) -> ReloadResponse:
        """Load what the folder holds now beside the present models, then swap."""

    async def probe(self) -> str:
        """Score a built-in item; return the version."""


class ScoringService:
    """Answers the requests of all routes; holds backend, image reader and metrics."""

    def __init__(self, backend: Backend, config: Config) -> None:
        self.backend = backend
        self.config = config.serve
        self.images = ImageReader(config.serve)
        self.metrics = Metrics()
        self._name = config.name
        self._kinds = config.kind_names
        self._probing = asyncio.Lock()
        self._probed: tuple[float, str | None] = (float("-inf"), None)

    def model_ref(self, version: str) -> ModelRef:
        """Name and version as answers give them."""
        return ModelRef(name=self._name, version=version)

    async def score(self, request: ScoreRequest, image: ImageBytes | None = None) -> ScoreResponse:
        """Answer a score request; ``image`` is the checked file of a form."""
        start = time.perf_counter()
        picture = image or await self.images.read(request.image)
        item = ScoreInput(
            image=picture,
            prompt=request.prompt,
            texts=tuple(request.texts),
            min_words=request.min_words,
            facts=request.facts,
        )
        asked = time.perf_counter()
        results, version = await self.results(item)
        end = time.perf_counter()
        return ScoreResponse(
            results=results,
            model=self.model_ref(version),
            timing_ms=Timing(total=1e3 * (end - start), score=1e3 * (end - asked)),
        )

    async def results(self, item: ScoreInput) -> tuple[list[TextResult], str]:
        """Score an item; the results in order and the version."""
        results, scored = await self.scored(item)
        return results, scored.version

    async def scored(self, item: ScoreInput) -> tuple[list[TextResult], ScoreOutput]:
        """Score an item; the results in order, and what they were made of."""
        start = time.perf_counter()
        scored = await self.backend.score(item)
        self.metrics.score_seconds.observe(time.perf_counter() - start)
        results = [text_result(text, scored.shape) for text in scored.texts]
        self.metrics.scored(results)
        return results, scored

    async def rank(self, request: RankRequest) -> RankResponse:
        """Put texts in order, by the rewards of one version of the models."""
        asked = ScoreRequest(
            text=request.texts,
            image=request.image,
            prompt=request.prompt,
            min_words=request.min_words,
        )
        answer = await self.score(asked)
        totals = [result.total for result in answer.results]
        return RankResponse(
            order=sorted(range(len(totals)), key=lambda at: -totals[at]),
            results=answer.results,
            model=answer.model,
            timing_ms=answer.timing_ms,
        )

    async def batch(self, request: BatchRequest) -> BatchResponse:
        """Answer each item by itself; a failed one gives its error in its place."""
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(index: int, item: ScoreRequest) -> ScoreResponse | ErrorResponse:
            async with slots:
                try:
                    return await self.score(item)
                except ApiError as error:
                    return error.inside(f"items.{index}").body()

        items = enumerate(request.items)
        return BatchResponse(responses=await gather_all(one(*item) for item in items))

    async def rewards(self, request: RewardRequest) -> RewardResponse:
        """Answer OpenRLHF: queries about the same image and question are scored together."""
        groups: dict[tuple[str, str], list[int]] = {}
        texts = [_response_of(request, index) for index in range(len(request.query))]
        for index in range(len(texts)):
            question = request.question
            asked = request.prompts[index] if question is None else question
            groups.setdefault((_image_of(request, index), asked), []).append(index)
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(image: str, prompt: str, indexes: Sequence[int]) -> list[TextResult]:
            async with slots:
                try:
                    item = ScoreInput(
                        image=await self.images.read(image),
                        prompt=prompt,
                        texts=tuple(texts[index] for index in indexes),
                        sampled=True,
                    )
                    return (await self.results(item))[0]
                except ApiError as error:
                    raise _of_query(error, indexes) from None

        shares = [
            (*key, members[start : start + MAX_TEXTS])
            for key, members in groups.items()
            for start in range(0, len(members), MAX_TEXTS)
        ]
        answers = await gather_all(one(*share) for share in shares)
        found: dict[int, TextResult] = {}
        for (_, _, indexes), results in zip(shares, answers, strict=True):
            found |= dict(zip(indexes, results, strict=True))
        return _reward_response([found[index] for index in range(len(texts))], self._kinds)

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Let the policy answer, with the best of several answers or under guard if asked."""
        return await generate(self, await self.images.read(request.image), request)

    async def ready(self) -> str | None:
        """Version that scored a probe within the last seconds, or None; probes do not pile up."""
        async with self._probing:
            at, version = self._probed
            if time.monotonic() - at > _PROBE_KEPT_S:
                try:
                    async with asyncio.timeout(_PROBE_LIMIT_S):
                        version = await self.backend.probe()
                except (ApiError, TimeoutError):
                    version = None
                self._probed = (time.monotonic(), version)
            return version


def _response_of(request: RewardRequest, index: int) -> str:
    query, prompt = request.query[index], request.prompts[index]
    if not query.startswith(prompt):
        raise invalid("does not start with its prompt", f"query.{index}")
    text = query.removeprefix(prompt)
    if len(text) > MAX_TEXT_CHARS:
        raise invalid(f"the response is longer than {MAX_TEXT_CHARS}", f"query.{index}")
    return text


def _image_of(request: RewardRequest, index: int) -> str:
    if request.images is not None:
        return request.images[index]
    label = (request.labels or [])[index]
    if not isinstance(label, str):
        raise invalid("without images, labels must hold them as text", f"labels.{index}")
    return label


def _of_query(error: ApiError, indexes: Sequence[int]) -> ApiError:
    name, _, position = (error.field or "").partition(".")
    index = indexes[int(position) if position.isdecimal() else 0]
    field = {"text": f"query.{index}", "image": f"images.{index}"}.get(name, error.field)
    return ApiError(
        error.status, error.type, str(error), field=field, retry_after=error.retry_after
    )


def _reward_response(results: Sequence[TextResult], kinds: Iterable[Kind]) -> RewardResponse:
    logs = {kind: [result.rewards[kind] for result in results] for kind in kinds}
    counts = {
        "penalty": [result.penalty for result in results],
        "segments": [float(len(result.segments)) for result in results],
    }
    return RewardResponse(
        rewards=[result.total for result in results],
        scores=[_clean_share(result) for result in results],
        extra_logs={**logs, **counts},
    )


def _clean_share(result: TextResult) -> float:
    if not result.segments:
        return 1.0
    bad = sum(
        any(score.hallu > max(score.ok, score.none) for score in segment.kinds.values())
        for segment in result.segments
    )
    return 1.0 - bad / len(result.segments)
