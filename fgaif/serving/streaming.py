"""WebSocket streams: score a text while it is being written, each sub-sentence once it is final.

A sub-sentence counts as finished when the splitting rules give it the same end whatever follows
(``settled_offsets``): a later sentence has begun with a whole word, or the next piece has begun and
``min_words`` words more than it needs are there. It is scored with the text so far up to the last
whole word, as part of a response that ends there: the models are causal, so what follows a segment
does not change its score. At the end the whole text is scored once more, and that result is what
``/v1/score`` says. Both agree wherever the policy's tokenizer treats a word alike whatever follows
it, as those of the Llama family do.
"""

import asyncio
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from fgaif.feedback.segment import settled_offsets
from fgaif.serving.api_errors import (
    ApiError,
    from_validation,
    invalid,
    overloaded,
    unauthorized,
    unavailable,
)
from fgaif.serving.middleware import InFlight, foreign, key_accepted, log_failure
from fgaif.serving.request_images import MIB
from fgaif.serving.schema import (
    MAX_TEXT_CHARS,
    StreamDelta,
    StreamEnd,
    StreamReady,
    StreamResult,
    StreamSegment,
    StreamStart,
    TextResult,
)
from fgaif.serving.scoring import ScoreInput
from fgaif.serving.service import ScoringService

_POLICY_VIOLATION = 1008
_INTERNAL = 1011


class ScoreStreams:
    """Handles the WebSocket streams of one ingress replica."""

    def __init__(self, service: ScoringService, in_flight: InFlight, key: str | None) -> None:
        self._service = service
        self._in_flight = in_flight
        self._key = key

    async def serve(self, socket: WebSocket) -> None:
        """Handle one connection to its end; an error is sent before it is closed."""
        headers = socket.headers
        if foreign(headers.get("origin"), headers.get("host"), self._service.config.cors):
            await socket.close(_POLICY_VIOLATION)
            return
        await socket.accept()
        try:
            await self._admit(socket)
            await socket.close()
        except ApiError as error:
            await _send_error(socket, error)
        except TimeoutError:
            await _send_error(socket, ApiError(504, "timeout", "nothing came for too long"))
        except WebSocketDisconnect:
            pass
        except Exception as error:
            log_failure(error)
            await _send_error(socket, ApiError(500, "internal", "the server failed"), _INTERNAL)

    async def _admit(self, socket: WebSocket) -> None:
        """Check the key, then follow the stream; without a key it takes no place among the others.

        Programs send the key as a header. Browsers cannot: theirs comes with the first message, for
        which few streams may wait, and not for long.
        """
        if self._in_flight.draining:
            raise unavailable()
        header, config = socket.headers.get("authorization"), self._service.config
        start = None
        if header is None and self._key is not None:
            if self._in_flight.streams_without_key >= config.streams_without_key:
                raise overloaded()
            self._in_flight.streams_without_key += 1
            try:
                start = await self._receive(socket, StreamStart, limit_s=config.start_timeout_s)
            finally:
                self._in_flight.streams_without_key -= 1
            header = f"Bearer {start.key or ''}"
        if not key_accepted(self._key, header):
            raise unauthorized()
        if self._in_flight.streams >= config.streams:
            raise overloaded()
        self._count(1)
        try:
            await self._stream(socket, start)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._in_flight.streams += change
        self._service.metrics.streams.set(self._in_flight.streams)

    async def _stream(self, socket: WebSocket, start: StreamStart | None) -> None:
        if start is None:
            limit_s = self._service.config.start_timeout_s
            start = await self._receive(socket, StreamStart, limit_s=limit_s)
        image = await self._service.images.read(start.image)
        (model,) = (await self._service.backend.models()).models
        await _send(socket, StreamReady(model=self._service.model_ref(model.version)))
        item = ScoreInput(
            image=image,
            prompt=start.prompt,
            texts=(),
            min_words=start.min_words,
            facts=start.facts,
        )
        trained = next(iter(model.cards.values())).min_words
        await self._follow(socket, item, start.min_words or trained)

    async def _follow(self, socket: WebSocket, item: ScoreInput, min_words: int) -> None:
        text, told = "", 0
        while not isinstance(
            message := await self._receive(socket, StreamDelta, StreamEnd), StreamEnd
        ):
            text += message.delta
            if len(text) > MAX_TEXT_CHARS:
                raise invalid(f"the text is longer than {MAX_TEXT_CHARS} characters", "delta")
            settled = settled_offsets(text, min_words)[-1]
            if settled > told:
                result = await self._score(item, _whole_words(text))
                for segment in result.segments:
                    if told < segment.end <= settled:
                        await _send(socket, StreamSegment(segment=segment))
                told = settled
        if not text.strip():
            raise invalid("there is no text", "delta")
        result = await self._score(item, text)
        for segment in result.segments:
            if segment.end > told:
                await _send(socket, StreamSegment(segment=segment))
        await _send(socket, StreamResult(result=result))

    async def _score(self, item: ScoreInput, text: str) -> TextResult:
        asked = ScoreInput(
            image=item.image,
            prompt=item.prompt,
            texts=(text,),
            min_words=item.min_words,
            facts=item.facts,
        )
        async with asyncio.timeout(self._service.config.timeout_s):
            (result,), _ = await self._service.results(asked)
        return result

    async def _receive(
        self, socket: WebSocket, *models: type[BaseModel], limit_s: float | None = None
    ) -> Any:
        """The next message, as the first of the models whose key it holds."""
        async with asyncio.timeout(limit_s or self._service.config.timeout_s):
            message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        content = message.get("text") or message.get("bytes") or ""
        if len(content) > self._service.config.max_body_mib * MIB:
            raise ApiError(413, "too_large", "the message is too large")
        failures = []
        for model in models:
            try:
                return model.model_validate_json(content)
            except ValidationError as error:
                failures.append(error)
        raise from_validation(min(failures, key=lambda error: error.error_count()))


def _whole_words(text: str) -> str:
    """The text without its last word, which may still grow."""
    return text.rstrip() if text[-1:].isspace() else text.rsplit(maxsplit=1)[0]


async def _send(socket: WebSocket, message: BaseModel) -> None:
    await socket.send_text(message.model_dump_json())


async def _send_error(socket: WebSocket, error: ApiError, code: int = _POLICY_VIOLATION) -> None:
    try:
        await _send(socket, error.body())
        await socket.close(code)
    except (RuntimeError, WebSocketDisconnect):  # it is closed already
        return
