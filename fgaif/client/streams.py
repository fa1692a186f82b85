"""The client's side of a WebSocket stream, with and without asyncio."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import suppress
from typing import Any

from websockets.asyncio.client import ClientConnection as AsyncConnection
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from fgaif.client.answers import Event, ScoringError, denied, read_event, read_ready, unreached
from fgaif.client.requests import ClientSettings, delta
from fgaif.serving.schema import TextResult

_BROKEN = (OSError, WebSocketException)


class _Denied(WebSocketException):
    """Instead of InvalidStatus, whose redirects ``connect`` would follow to any host."""


class _Connection(ClientConnection):
    def handshake(self, *args: Any, **options: Any) -> None:
        try:
            super().handshake(*args, **options)
        except InvalidStatus as error:
            raise _Denied from error


class _AsyncConnection(AsyncConnection):
    async def handshake(self, *args: Any, **options: Any) -> None:
        try:
            await super().handshake(*args, **options)
        except InvalidStatus as error:
            raise _Denied from error


_END = '{"end": true}'
_LARGEST_MESSAGE = 2**26


def open_stream(settings: ClientSettings, first: str) -> ClientConnection:
    """Connect, send the first message and wait until the service is ready.

    Raises:
        ScoringError: refused, out of reach, or too late.
    """
    url, socket = settings.stream_url, None
    try:
        socket = connect(url, create_connection=_Connection, **_options(settings))
        socket.send(first)
        read_ready(url, socket.recv(settings.timeout_s))
    except (*_BROKEN, ScoringError) as error:
        if socket is not None:
            socket.close()
        raise _explained(url, error, settings) from None
    return socket


def exchange(
    socket: ClientConnection, settings: ClientSettings, pieces: Iterable[str]
) -> Iterator[Event]:
    """Send the pieces and yield what comes back, after each piece and at the end."""
    url = settings.stream_url
    event: Event | None = None
    try:
        with suppress(ConnectionClosed):  # the service's last message says why
            for piece in pieces:
                socket.send(delta(piece))
                for message in _waiting(socket):
                    yield read_event(url, message)
            socket.send(_END)
        while not isinstance(event, TextResult):
            event = read_event(url, socket.recv(settings.timeout_s))
            yield event
    except _BROKEN as error:
        raise unreached(url, error, settings.timeout_s) from None


def _waiting(socket: ClientConnection) -> Iterator[str | bytes]:
    """The messages that have come in, without waiting for more."""
    with suppress(TimeoutError):
        while True:
            yield socket.recv(0)


async def open_stream_async(settings: ClientSettings, first: str) -> AsyncConnection:
    """See :func:`open_stream`."""
    url, socket = settings.stream_url, None
    try:
        connecting = connect_async(url, create_connection=_AsyncConnection, **_options(settings))
        socket = await connecting
        await socket.send(first)
        async with asyncio.timeout(settings.timeout_s):
            read_ready(url, await socket.recv())
    except (*_BROKEN, ScoringError) as error:
        if socket is not None:
            await socket.close()
        raise _explained(url, error, settings) from None
    return socket


async def exchange_async(
    socket: AsyncConnection, settings: ClientSettings, pieces: AsyncIterable[str]
) -> AsyncIterator[Event]:
    """Send the pieces and yield what comes back, as soon as it comes."""
    url = settings.stream_url
    broken: list[Exception] = []
    sending = asyncio.create_task(_send(socket, pieces, broken))
    event: Event | None = None
    try:
        while not isinstance(event, TextResult):
            event = read_event(url, await socket.recv())
            yield event
    except _BROKEN as error:
        if broken:
            raise broken[0] from None
        raise unreached(url, error, settings.timeout_s) from None
    finally:
        sending.cancel()
        await socket.close()


async def _send(
    socket: AsyncConnection, pieces: AsyncIterable[str], broken: list[Exception]
) -> None:
    """Send the text; what its source raises goes to ``broken``."""
    try:
        async for piece in pieces:
            await socket.send(delta(piece))
        await socket.send(_END)
    except ConnectionClosed:
        return  # the receiving side tells why
    except Exception as error:
        broken.append(error)
        await socket.close()  # wakes whoever waits for scores


def _options(settings: ClientSettings) -> dict[str, Any]:
    return {
        "additional_headers": settings.headers,
        "max_size": _LARGEST_MESSAGE,
        "open_timeout": settings.timeout_s,
        "close_timeout": settings.timeout_s,
        "proxy": None if settings.direct else True,
    }


def _explained(url: str, error: Exception, settings: ClientSettings) -> ScoringError:
    if isinstance(error, ScoringError):
        return error
    if isinstance(error.__cause__, InvalidStatus):
        return denied(url, error.__cause__)
    return unreached(url, error, settings.timeout_s)
