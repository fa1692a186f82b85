"""Client of the scoring service, without torch and Ray.

    with RewardClient("http://127.0.0.1:8000") as client:
        answer = client.score("photo.jpg", "A dog sits on a red couch.")
        print(answer.results[0].total, answer.results[0].segments[0].kinds["object"].hallu)

Every call is repeated while the service is overloaded, restarting or out of reach, ``attempts``
times in all; ``timeout_s`` bounds one attempt. All raise :class:`ScoringRefused` where the request
is at fault and :class:`ScoringError` where there is no score for another reason.
"""

from abc import ABC, abstractmethod
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from typing import Any, ParamSpec, Self, TypeVar

import httpx2
from pydantic import BaseModel
from tenacity import AsyncRetrying, Retrying

from fgaif.client.answers import Event, ScoringError, read, rewards, unreached
from fgaif.client.requests import (
    Batch,
    Call,
    ClientSettings,
    Image,
    ScoreItem,
    client_settings,
    models_call,
    reward_call,
    score_call,
    start,
)
from fgaif.client.streams import exchange, exchange_async, open_stream, open_stream_async
from fgaif.serving.schema import DEFAULT_PROMPT, ModelsResponse, RewardResponse, ScoreResponse
from fgaif.types import Kind

P = ParamSpec("P")
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


class _Client(ABC):
    """Settings and connections of both clients."""

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
            client_settings(
                base_url, key, timeout_s=timeout_s, attempts=attempts, backoff_s=backoff_s
            )
        )

    # Trainers with worker processes pickle their reward functions; connections stay behind.
    def __getstate__(self) -> ClientSettings:
        return self._settings

    def __setstate__(self, settings: ClientSettings) -> None:
        self._use(settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.base_url!r})"

    def _use(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._http = self._connect(settings)

    @abstractmethod
    def _connect(self, settings: ClientSettings) -> Any:
        """An HTTP client."""

    def _unreached(self, call: Call[Any], error: Exception) -> ScoringError:
        where = f"{self._settings.base_url}{call.path}"
        return unreached(where, error, self._settings.timeout_s)


class RewardClient(_Client):
    """Client of the scoring service for ordinary code; may be shared by threads.

    Args:
        base_url: where ``fgaif serve`` listens.
        key: the service's key; default: the environment variable ``FGAIF_SERVE_KEY``.
        timeout_s: of one attempt.
        attempts: of a call, the first one included.
        backoff_s: pause before the second attempt where the service names none; it doubles.

    Raises:
        ConfigError: an address, key or number that cannot be used.
    """

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
        return self._retrying(self._send, score_call(item))

    def score_batch(self, items: Sequence[ScoreItem]) -> list[ScoreResponse | ScoringError]:
        """Score several images; the place of an item that got no score holds its error.

        Raises:
            DataError: an image's file cannot be read.
            ScoringError: the request as a whole failed.
        """
        batch = Batch(items, self._settings.base_url)

        def attempt() -> None:
            batch.take(self._send(batch.call()))

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
        return self._retrying(self._send, reward_call(queries, prompts, images, question))

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
        with self._retrying(open_stream, self._settings, first) as socket:
            yield from exchange(socket, self._settings, pieces)

    def models(self) -> ModelsResponse:
        """Tell which reward models are served."""
        return self._retrying(self._send, models_call())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _connect(self, settings: ClientSettings) -> httpx2.Client:
        return httpx2.Client(**settings.http())

    def _retrying(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return Retrying(**self._settings.retries())(call, *args, **options)

    def _send(self, call: Call[Model]) -> Model:
        try:
            response = self._http.request(**call.http())
        except httpx2.HTTPError as error:
            raise self._unreached(call, error) from None
        return read(response, call.answer)


class AsyncRewardClient(_Client):
    """Client for asyncio: :class:`RewardClient` with awaited calls, used in one event loop."""

    async def score(
        self,
        image: Image,
        text: str | Sequence[str],
        *,
        prompt: str = DEFAULT_PROMPT,
        facts: bool = False,
    ) -> ScoreResponse:
        """See :meth:`RewardClient.score`."""
        item = ScoreItem(image=image, text=text, prompt=prompt, facts=facts)
        return await self._retrying(self._send, score_call(item))

    async def score_batch(self, items: Sequence[ScoreItem]) -> list[ScoreResponse | ScoringError]:
        """See :meth:`RewardClient.score_batch`."""
        batch = Batch(items, self._settings.base_url)

        async def attempt() -> None:
            batch.take(await self._send(batch.call()))

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
        return await self._retrying(self._send, reward_call(queries, prompts, images, question))

    async def stream(
        self, image: Image, pieces: AsyncIterable[str], *, prompt: str = DEFAULT_PROMPT
    ) -> AsyncIterator[Event]:
        """See :meth:`RewardClient.stream`; here scores are yielded as soon as they come."""
        first = start(image, prompt)
        socket = await self._retrying(open_stream_async, self._settings, first)
        async for event in exchange_async(socket, self._settings, pieces):
            yield event

    async def models(self) -> ModelsResponse:
        """See :meth:`RewardClient.models`."""
        return await self._retrying(self._send, models_call())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.close()

    def _connect(self, settings: ClientSettings) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(**settings.http())

    async def _retrying(
        self, call: Callable[P, Awaitable[T]], *args: P.args, **options: P.kwargs
    ) -> T:
        return await AsyncRetrying(**self._settings.retries())(call, *args, **options)

    async def _send(self, call: Call[Model]) -> Model:
        try:
            response = await self._http.request(**call.http())
        except httpx2.HTTPError as error:
            raise self._unreached(call, error) from None
        return read(response, call.answer)
