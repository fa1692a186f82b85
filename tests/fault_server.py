"""A local server that speaks the chat-completions format and, on purpose, fails now and then.

Faults are a function of seed, request body and how often that body was seen: the same job meets
the same faults whatever the order of its requests. A GET returns the counts as JSON, for tests
whose client is another process.
"""

import asyncio
import hashlib
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

KINDS = ("429", "500", "hang", "truncated", "no_choices", "off_topic", "reset", "slow")
"""All faults. ``off_topic`` is a good completion whose text is not what was asked for; ``slow`` is
a right reply, late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Which requests fail, and how. ``hang_s`` must be longer than the client's time-out."""

    rate: float = 0.0
    seed: int = 0
    kinds: tuple[str, ...] = KINDS
    retry_after_s: float = 0.02
    hang_s: float = 60.0
    slow_s: float = 0.05

    def pick(self, body: bytes, seen: int) -> str | None:
        """The fault of a body that was seen ``seen`` times before."""
        digest = hashlib.sha256(f"{self.seed}:{seen}:".encode() + body).digest()
        if int.from_bytes(digest[:8], "big") >= self.rate * 2**64:
            return None
        return self.kinds[digest[8] % len(self.kinds)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A right reply: its text, the first token's alternatives (given if asked for), its tokens."""

    text: str | None
    first_token: tuple[tuple[str, float], ...] = ()
    finish: str = "stop"
    usage: tuple[int, int] | None = (100, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    """Any other reply."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


Handler = Callable[[dict[str, Any]], str | Answer | Http]


class FaultServer:
    """Answers in a thread of its own: ``with FaultServer(answer) as server: server.base_url``.

    ``answer`` gets a request's JSON body and returns the right reply. Counted are, by question
    (:func:`question`), the requests and the right replies that left, and the faults by kind.
    """

    def __init__(
        self,
        answer: Handler,
        faults: Faults | None = None,
        *,
        latency_s: float = 0.0,
        keep: bool = False,
    ) -> None:
        self._answer = answer
        self.faults = faults or Faults()
        self.latency_s = latency_s
        self.requests: Counter[str] = Counter()
        self.replies: Counter[str] = Counter()
        self.faulty: Counter[str] = Counter()
        self.peak = 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.errors: list[Exception] = []
        self._keep = keep
        self._now = 0
        self._seen: Counter[bytes] = Counter()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10), "the fault server did not start"
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        if self.errors and error is None:
            raise self.errors[0]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = web.Server(self._handle, access_log=None, handler_cancellation=True)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        self.port: int = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "GET":
            counts = {"requests": self.requests, "replies": self.replies, "faulty": self.faulty}
            return web.json_response(counts)
        self._now += 1
        self.peak = max(self.peak, self._now)
        try:
            return await self._reply(request)
        except Exception as error:
            self.errors.append(error)
            raise
        finally:
            self._now -= 1

    async def _reply(self, request: web.BaseRequest) -> web.StreamResponse:
        raw = await request.content.read()
        body = json.loads(raw)
        if self._keep:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
        asked = question(body)
        self.requests[asked] += 1
        digest = hashlib.sha256(raw).digest()
        fault = self.faults.pick(raw, self._seen[digest])
        self._seen[digest] += 1
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        if fault is not None:
            self.faulty[fault] += 1
        answer = self._answer(body)
        if isinstance(answer, Http):
            return _respond(answer)
        answer = Answer(text=answer) if isinstance(answer, str) else answer
        if fault is not None and fault != "slow":
            return await self._fail(fault, request, completion(body, answer))
        if fault == "slow":
            await asyncio.sleep(self.faults.slow_s)
        self.replies[asked] += 1
        return _respond(Http(status=200, body=completion(body, answer)))

    async def _fail(self, fault: str, request: web.BaseRequest, right: Any) -> web.StreamResponse:
        if fault == "429":
            # Both forms, as some gateways send them; the finer one is to be preferred.
            wait = {"retry-after-ms": f"{self.faults.retry_after_s * 1000:g}", "Retry-After": "1"}
            error = {"message": "Rate limit reached", "code": "rate_limit_exceeded"}
            return _respond(Http(status=429, body={"error": error}, headers=wait))
        if fault == "500":
            return _respond(Http(status=500, body={"error": {"message": "internal error"}}))
        if fault == "hang":
            await asyncio.sleep(self.faults.hang_s)
            return _respond(Http(status=504, body={}))
        if fault == "truncated":
            text = json.dumps(right)
            return _respond(Http(status=200, body=text[: len(text) // 2].encode()))
        if fault == "no_choices":
            return _respond(Http(status=200, body={"object": "chat.completion", "usage": None}))
        if fault == "off_topic":
            right["choices"][0]["message"]["content"] = "I am a teapot; ask me about {tea"
            return _respond(Http(status=200, body=right))
        assert fault == "reset", f"no such fault: {fault}"
        assert request.transport is not None
        sock = request.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
        return web.Response()


def question(body: dict[str, Any]) -> str:
    """The last message's text, and after it the start of the image's hash where there is one."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    text = "".join(part.get("text", "") for part in content)
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return " ".join([text, *(hashlib.sha256(url.encode()).hexdigest()[:16] for url in urls)])


def completion(body: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """The reply's JSON, with the log-probs that were asked for."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text},
        "finish_reason": answer.finish,
        "logprobs": None,
    }
    if body.get("logprobs") and answer.first_token:
        items = [{"token": token, "logprob": value} for token, value in answer.first_token]
        first = items[0] | {"top_logprobs": items[: body.get("top_logprobs", 0)]}
        choice["logprobs"] = {"content": [first]}
    reply = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
    }
    if answer.usage is not None:
        read, written = answer.usage
        reply["usage"] = {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }
    return reply


def _respond(reply: Http) -> web.Response:
    raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
    return web.Response(
        status=reply.status, body=raw, headers={"Content-Type": "application/json"} | reply.headers
    )
