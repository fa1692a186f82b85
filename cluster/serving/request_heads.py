"""Limits for connections to Ray Serve's proxies that never finish the head of a request.

uvicorn, which the proxies run, closes a connection that is idle after an answer, but neither one
that sends nothing at all nor one whose headers never end, and Ray Serve has no option for it. What
it does have is a function that each proxy calls before its server starts, named in the environment
of Ray's processes (``CALLBACK``): here it puts the limits into uvicorn's protocol.
"""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CALLBACK = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.serving.request_heads.limit_proxy"
}
_log = logging.getLogger("ray.serve")


def limit_proxy() -> list[Any]:
    """Have the HTTP server of this process limit request heads; return no middleware."""
    if auto.AutoHTTPProtocol is HttpToolsProtocol:
        auto.AutoHTTPProtocol = LimitedHeads
    elif auto.AutoHTTPProtocol is not LimitedHeads:
        _log.warning("request heads are not limited: uvicorn runs without httptools")
    return []


class LimitedHeads(HttpToolsProtocol):
    """Closes connections whose request head takes too long or is too large.

    The time runs from connecting, or from the first byte of a later request. It runs as well while
    the rest of a body comes in whose request has been answered (refused) already.
    """

    head_s = 15.0
    head_bytes = 65_536
    _timer: asyncio.TimerHandle | None = None
    _received = 0
    _in_message = False
    _upgraded = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of the first head."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """Note that a body follows."""
        self._in_message = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that a head may follow."""
        self._in_message = False
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        """Leave the connection to the WebSocket protocol."""
        self._upgraded = True
        super().handle_websocket_upgrade()

    def data_received(self, data: bytes) -> None:
        """Parse; stop the time once a request is complete, close a head that is too large."""
        in_head = not self._in_message
        super().data_received(data)
        if self._upgraded or (self.cycle is not None and not self.cycle.response_complete):
            self._stop_waiting()
            return
        self._wait()
        if in_head:
            self._received += len(data)
        if self._received > self.head_bytes:
            self._close()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_s, self._close)

    def _stop_waiting(self) -> None:
        self._received = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
