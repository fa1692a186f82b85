"""Connections that never finish the head of a request; timers are fired by hand."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from cluster.serving.request_heads import CALLBACK, LimitedHeads, limit_proxy

HEAD = b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Timer:
    def __init__(self, work: Callable[[], None]) -> None:
        self.work, self.live = work, True

    def cancel(self) -> None:
        self.live = False


class Loop:
    """Keeps timers and the tasks of requests; runs neither."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Timer]] = []

    def call_later(self, seconds: float, work: Callable[[], None]) -> Timer:
        self.timers.append((seconds, Timer(work)))
        return self.timers[-1][1]

    def create_task(self, work: Any, **_: Any) -> Future[None]:
        work.close()
        return Future()

    def pass_time(self) -> None:
        """Fire the timers of heads that are still running."""
        for seconds, timer in self.timers:
            if timer.live and seconds == LimitedHeads.head_s:
                timer.work()


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.protocol: Any = None

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def write(self, data: Any) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol


class WebSocket(asyncio.Protocol):
    """What uvicorn hands the connection to."""

    def __init__(self, **_: Any) -> None:
        pass


Connection = tuple[LimitedHeads, Transport, Loop]


@pytest.fixture
def connection() -> Connection:
    config = uvicorn.Config(lambda: None, factory=True)
    config.load()
    loop, transport = Loop(), Transport()
    protocol = LimitedHeads(config, ServerState(), {}, _loop=loop)  # type: ignore[arg-type]
    protocol.connection_made(transport)
    return protocol, transport, loop


def test_a_connection_that_sends_nothing_or_half_a_head_is_closed(connection: Connection) -> None:
    protocol, transport, loop = connection
    protocol.data_received(HEAD[:20])
    protocol.data_received(HEAD[20:30])
    assert len(loop.timers) == 1  # more bytes give no more time
    assert not transport.closed
    loop.pass_time()
    assert transport.closed


def test_a_request_with_its_head_has_all_time(connection: Connection) -> None:
    protocol, transport, loop = connection
    protocol.data_received(HEAD + b"x" * 90_000)
    loop.pass_time()
    assert not transport.closed


def test_the_head_of_a_later_request_is_waited_for_as_long(connection: Connection) -> None:
    protocol, transport, loop = connection
    protocol.data_received(HEAD + b"x" * 100_000)
    protocol.cycle.response_complete = True
    protocol.on_response_complete()
    loop.pass_time()
    assert not transport.closed  # idle between requests: uvicorn's own, longer limit
    protocol.data_received(HEAD[:20])
    loop.pass_time()
    assert transport.closed


def test_the_body_of_a_refused_request_is_read_for_a_while(connection: Connection) -> None:
    protocol, transport, loop = connection
    protocol.data_received(HEAD)
    protocol.cycle.response_complete = True  # 401 or 413, before the body
    protocol.on_response_complete()
    protocol.data_received(b"x" * 99_000)
    assert not transport.closed  # its sender is to see the answer
    protocol.data_received(b"x" * 1_000)
    assert not transport.closed
    loop.pass_time()
    assert transport.closed


def test_a_head_without_end_is_too_large(connection: Connection) -> None:
    protocol, transport, _ = connection
    protocol.data_received(HEAD[:-2])
    for _ in range(7):
        protocol.data_received(b"X-More: " + b"a" * 10_000 + b"\r\n")
    assert transport.closed


def test_websockets_are_left_alone(connection: Connection) -> None:
    protocol, transport, loop = connection
    protocol.ws_protocol_class = WebSocket
    protocol.data_received(UPGRADE)
    assert isinstance(transport.protocol, WebSocket)
    loop.pass_time()
    assert not transport.closed


@pytest.fixture
def plain_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "AutoHTTPProtocol", HttpToolsProtocol)


@pytest.mark.usefixtures("plain_uvicorn")
def test_the_server_of_a_proxy_uses_it() -> None:
    from ray.serve._private import constants
    from ray.serve._private.utils import call_function_from_import_path

    (variable, path) = next(iter(CALLBACK.items()))
    assert hasattr(constants, variable)
    assert call_function_from_import_path(path) == []
    assert limit_proxy() == []  # twice is no more than once
    config = uvicorn.Config(lambda: None, factory=True)
    config.load()
    assert config.http_protocol_class is LimitedHeads
