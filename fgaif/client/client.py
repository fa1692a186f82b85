"""Client of the scoring service, without torch and Ray.

    with RewardClient("http://127.0.0.1:8000") as client:
        answer = client.score("photo.jpg", "A dog sits on a red couch.")
        print(answer.results[0].total, answer.results[0].segments[0].kinds["object"].hallu)

Every call is repeated while the service is overloaded, restarting or out of reach, ``attempts``
times in all; ``timeout_s`` bounds one attempt. All raise :class:`ScoringRefused` where the request
is at fault and :class:`ScoringError` where there is no score for another reason.
"""

from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from typing import ParamSpec, Self, TypeVar

import httpx2
from pydantic import BaseModel
from tenacity import AsyncRetrying, Retrying

from fgaif.client.requests import (
    BATCH,
    GET_REWARD,
    MODELS,
    SCORE,
    Batch,
    Image,
    ScoreItem,
    Service,
    encode,
    make_service,
    reward_body,
    start,
)
from fgaif.client.results import Event, ScoringError, read, rewards, unreached
from fgaif.client.streams import exchange, exchange_async, open_stream, open_stream_async
from fgaif.serving.schema import (
    DEFAULT_PROMPT,
    BatchResponse,
    ModelsResponse,
    RewardResponse,
    ScoreResponse,
)
from fgaif.types import Kind

P = ParamSpec("P")
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

_JSON = {"Content-Type": "application/json"}


class RewardClient:
    """The service, for ordinary code; may be shared by threads.

    Args:
        base_url: where ``fgaif serve`` listens.
        key: the service's key; default: the environment variable ``FGAIF_SERVE_KEY``.
        timeout_s: of one attempt.
        attempts: of a call, the first one included.
        backoff_s: pause before the second attempt where the service names none; it doubles.

    Raises:
        ConfigError: an address, key or number that cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        attempts: int = 6,
        backoff_s: float = 0.5,
    ) -> None:
        self._use(
            make_service(base_url, key, timeout_s=timeout_s, attempts=attempts, backoff_s=backoff_s)
        )

    def score(
        self,
        image: Image,
        text: str | Sequence[str],
        *,
        prompt: str = DEFAULT_PROMPT,
        facts: bool = False,
    ) -> ScoreResponse:
        """Score one text, or several, about an image; ``results`` are in the order of the texts.

        Raises:
            DataError: the image's file cannot be read.
            ScoringError: no score.
        """
        item = ScoreItem(image=image, text=text, prompt=prompt, facts=facts)
        body = encode(item.body())
        return self._retrying(self._post, SCORE, body, ScoreResponse)

    def score_batch(self, items: Sequence[ScoreItem]) -> list[ScoreResponse | ScoringError]:
        """Score several images; the place of an item that got no score holds its error.

        Raises:
            DataError: an image's file cannot be read.
            ScoringError: the request as a whole failed.
        """
        batch = Batch(items)
        where = f"{self._service.base_url}{BATCH}"

        def attempt() -> None:
            batch.take(self._post(BATCH, batch.body(), BatchResponse), where)

        try:
            self._retrying(attempt)
        except ScoringError as error:
            if error is not batch.busy:
                raise
        return batch.results

    def reward(self, items: Sequence[ScoreItem], *, kind: Kind | None = None) -> list[float]:
        """Return one reward per text, in order: the total, or that of one kind.

        Raises:
            DataError: an image's file cannot be read.
            ScoringError: any of them got no score.
        """
        return [reward for answer in self.score_batch(items) for reward in rewards(answer, kind)]

    def get_reward(
        self,
        queries: Sequence[str],
        prompts: Sequence[str],
        images: Sequence[Image],
        *,
        question: str | None = None,
    ) -> RewardResponse:
        """Ask as OpenRLHF does: ``queries`` are prompts with responses, one image for each.

        Args:
            question: what the reward models are told was asked; default: the prompt as it is, which
                for them should be without chat template.

        Raises:
            DataError: an image's file cannot be read.
            ScoringError: no scores.
        """
        body = encode(reward_body(queries, prompts, images, question))
        return self._retrying(self._post, GET_REWARD, body, RewardResponse)

    def stream(
        self, image: Image, pieces: Iterable[str], *, prompt: str = DEFAULT_PROMPT
    ) -> Iterator[Event]:
        """Score a text while it is being written.

        Yields:
            each sub-sentence's scores, at the next piece of text after they are there, and last
            the whole text's. A connection that breaks is not made again.

        Raises:
            DataError: the image's file cannot be read.
            ScoringError: no score, or the connection broke.
        """
        first = start(image, prompt)
        with self._retrying(open_stream, self._service, first) as socket:
            yield from exchange(socket, self._service, pieces)

    def models(self) -> ModelsResponse:
        """Tell which reward models are served."""
        return self._retrying(self._get, MODELS, ModelsResponse)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RewardClient({self._service.base_url!r})"

    # Trainers with worker processes pickle their reward functions; connections stay behind.
    def __getstate__(self) -> Service:
        return self._service

    def __setstate__(self, service: Service) -> None:
        self._use(service)

    def _use(self, service: Service) -> None:
        self._service = service
        self._http = httpx2.Client(**service.http())

    def _retrying(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return Retrying(**self._service.retries())(call, *args, **options)

    def _post(self, path: str, body: bytes, model: type[Model]) -> Model:
        return self._ask(self._http.build_request("POST", path, content=body, headers=_JSON), model)

    def _get(self, path: str, model: type[Model]) -> Model:
        return self._ask(self._http.build_request("GET", path), model)

    def _ask(self, request: httpx2.Request, model: type[Model]) -> Model:
        try:
            response = self._http.send(request)
        except httpx2.HTTPError as error:
            raise unreached(str(request.url), error, self._service.timeout_s) from None
        return read(response, model)


class AsyncRewardClient:
    """The service, for asyncio: :class:`RewardClient` with awaited calls, in one event loop."""

    def __init__(
        self,
        base_url: str,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        attempts: int = 6,
        backoff_s: float = 0.5,
    ) -> None:
        self._service = make_service(
            base_url, key, timeout_s=timeout_s, attempts=attempts, backoff_s=backoff_s
        )
        self._http = httpx2.AsyncClient(**self._service.http())

    async def score(
        self,
        image: Image,
        text: str | Sequence[str],
        *,
        prompt: str = DEFAULT_PROMPT,
        facts: bool = False,
    ) -> ScoreResponse:
        """See :meth:`RewardClient.score`."""
        body = encode(ScoreItem(image=image, text=text, prompt=prompt, facts=facts).body())
        return await self._retrying(self._post, SCORE, body, ScoreResponse)

    async def score_batch(self, items: Sequence[ScoreItem]) -> list[ScoreResponse | ScoringError]:
        """See :meth:`RewardClient.score_batch`."""
        batch = Batch(items)
        where = f"{self._service.base_url}{BATCH}"

        async def attempt() -> None:
            batch.take(await self._post(BATCH, batch.body(), BatchResponse), where)

        try:
            await self._retrying(attempt)
        except ScoringError as error:
            if error is not batch.busy:
                raise
        return batch.results

    async def reward(self, items: Sequence[ScoreItem], *, kind: Kind | None = None) -> list[float]:
        """See :meth:`RewardClient.reward`."""
        answers = await self.score_batch(items)
        return [reward for answer in answers for reward in rewards(answer, kind)]

    async def get_reward(
        self,
        queries: Sequence[str],
        prompts: Sequence[str],
        images: Sequence[Image],
        *,
        question: str | None = None,
    ) -> RewardResponse:
        """See :meth:`RewardClient.get_reward`."""
        body = encode(reward_body(queries, prompts, images, question))
        return await self._retrying(self._post, GET_REWARD, body, RewardResponse)

    async def stream(
        self, image: Image, pieces: AsyncIterable[str], *, prompt: str = DEFAULT_PROMPT
    ) -> AsyncIterator[Event]:
        """See :meth:`RewardClient.stream`; here scores are yielded as soon as they come."""
        first = start(image, prompt)
        socket = await self._retrying(open_stream_async, self._service, first)
        async for event in exchange_async(socket, self._service, pieces):
            yield event

    async def models(self) -> ModelsResponse:
        """See :meth:`RewardClient.models`."""
        return await self._retrying(self._get, MODELS, ModelsResponse)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncRewardClient({self._service.base_url!r})"

    async def _retrying(
        self, call: Callable[P, Awaitable[T]], *args: P.args, **options: P.kwargs
    ) -> T:
        return await AsyncRetrying(**self._service.retries())(call, *args, **options)

    async def _post(self, path: str, body: bytes, model: type[Model]) -> Model:
        request = self._http.build_request("POST", path, content=body, headers=_JSON)
        return await self._ask(request, model)

    async def _get(self, path: str, model: type[Model]) -> Model:
        return await self._ask(self._http.build_request("GET", path), model)

    async def _ask(self, request: httpx2.Request, model: type[Model]) -> Model:
        try:
            response = await self._http.send(request)
        except httpx2.HTTPError as error:
            raise unreached(str(request.url), error, self._service.timeout_s) from None
        return read(response, model)
