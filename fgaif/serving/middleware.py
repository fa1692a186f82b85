"""ASGI middleware for every HTTP request: key, limits of size, number and time, error answers.

Bodies are read here, up to the limit, before the application sees them: no parser gets more.
"""

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from fgaif.config import ServeConfig
from fgaif.serving.api_errors import ApiError, overloaded, unauthorized, unavailable
from fgaif.serving.prometheus import Metrics
from fgaif.serving.request_images import MIB

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/page.css", "/page.js", "/healthz", "/openapi.json"})
"""Paths without a key: they hold no scores; the page asks its user for the key."""

RELOAD = "/v1/models/reload"

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_log = logging.getLogger("fgaif.serve")


def key_accepted(key: str | None, authorization: str | None) -> bool:
    """Compare a bearer header with the key in constant time; without a key all are let in."""
    if key is None:
        return True
    scheme, _, given = (authorization or "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())
    return scheme.lower() == "bearer" and right


@dataclass(slots=True)
class InFlight:
    """Numbers of requests and WebSocket streams that an ingress replica is working on.

    ``streams_without_key`` have sent no key yet and are not among ``streams``; while ``draining``,
    before the replica stops, new ones are refused.
    """

    requests: int = 0
    streams: int = 0
    streams_without_key: int = 0
    draining: bool = False


class RequestLimits:
    """Checks the key and the limits of HTTP requests; ``ScoreStreams`` does so for WebSockets."""

    def __init__(
        self,
        app: App,
        *,
        config: ServeConfig,
        key: str | None,
        metrics: Metrics,
        in_flight: InFlight,
    ) -> None:
        self._app = app
        self._config = config
        self._key = key
        self._metrics = metrics
        self._max_bytes = int(config.max_body_mib * MIB)
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or answer with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _Reply(send)
        start = time.perf_counter()
        loads = scope["path"] == RELOAD
        limit_s = self._config.reload_timeout_s if loads else self._config.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._admit(scope, receive, reply)
        except ApiError as error:
            await reply.instead(scope, error)
        except TimeoutError:
            told = ApiError(504, "timeout", f"not done within {limit_s:g} s")
            await reply.instead(scope, told)
        except Exception as error:
            log_failure(error)
            await reply.instead(scope, ApiError(500, "internal", "the server failed"))
        seconds = time.perf_counter() - start
        self._metrics.request(scope, reply.status, seconds)
        _log.info("%s %s %d %.0f ms", scope["method"], scope["path"], reply.status, 1e3 * seconds)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        preflight = scope["method"] == "OPTIONS" and "origin" in headers
        if scope["path"] not in OPEN and not preflight:
            self._authorise(headers)
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            await self._app(scope, receive, send)
            return
        if self._in_flight.draining:
            raise unavailable()
        if self._in_flight.requests >= self._config.queue:
            raise overloaded()
        self._in_flight.requests += 1
        self._metrics.working.set(self._in_flight.requests)
        try:
            body = await self._read(headers, receive)
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._in_flight.requests -= 1
            self._metrics.working.set(self._in_flight.requests)

    def _authorise(self, headers: Headers) -> None:
        if not key_accepted(self._key, headers.get("authorization")):
            raise unauthorized()

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "invalid_request", "the body ended early")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, "too_large", f"the body is larger than {self._max_bytes} bytes")


class _Reply:
    """Sends an answer with the security headers; ``status`` is 500 until it has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False
        self.status = 500

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)

    async def instead(self, scope: Scope, error: ApiError) -> None:
        """Answer with an error; an answer that has begun is left as it is."""
        if not self._begun:
            await error.response()(scope, _nothing, self)


def log_failure(error: BaseException) -> None:
    """Log where it failed, without the message, which may hold parts of a request."""
    frames = traceback.format_tb(error.__traceback__)
    _log.error("unexpected %s\n%s", type(error).__name__, "".join(frames))


def foreign(origin: str | None, host: str | None, allowed: Iterable[str]) -> bool:
    """Whether a request comes from the page of another site, in a browser, that is not allowed."""
    if origin is None or origin in allowed:
        return False
    return origin.partition("://")[2].lower() != (host or "").lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
