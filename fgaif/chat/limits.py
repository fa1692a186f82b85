"""What requests may cost and how fast they may go: estimates, budget, rates, shared pauses."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiolimiter import AsyncLimiter

from fgaif.chat.messages import ChatRequest
from fgaif.chat.secrets import is_loopback
from fgaif.config import EndpointConfig
from fgaif.errors import ConfigError, ServiceError

Sleep = Callable[[float], Awaitable[None]]
Clock = Callable[[], float]

_MESSAGE_TOKENS = 8
"""Roles and separators around a message, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """Tokens and their price, in the currency of the configuration's prices."""

    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        """Input and output."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: "Spend") -> "Spend":
        return Spend(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cost=self.cost + other.cost,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Totals of a job so far. ``requests`` were sent, of them ``replies`` gave a reply.

    ``retries`` counts by cause what was sent again; ``failed`` got no reply in the end.
    ``unpriced`` says that some endpoint's replies cost nothing because no price is set for it.
    """

    requests: int = 0
    replies: int = 0
    failed: int = 0
    retries: dict[str, int] = field(default_factory=dict)
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    unpriced: bool = False

    @property
    def tokens(self) -> int:
        """Input and output."""
        return self.input_tokens + self.output_tokens

    def line(self) -> str:
        """One short line for a progress bar."""
        parts = [f"cost {self.cost:.4g}"] if self.cost else []
        parts += ["no price set"] if self.unpriced else []
        parts.append(f"{self.replies:,} replies")
        if self.retries:
            causes = ", ".join(f"{n} {cause}" for cause, n in sorted(self.retries.items()))
            parts.append(f"{sum(self.retries.values()):,} retries ({causes})")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        parts.append(f"{self.tokens:,} tokens")
        return ", ".join(parts)


def has_price(config: EndpointConfig) -> bool:
    """Whether a price is set, or nobody is to be paid: servers on this machine are free."""
    return bool(config.price_input or config.price_output) or is_loopback(config.base_url)


def check_prices(entry: str, config: EndpointConfig, max_cost: float | None) -> None:
    """Refuse a cost limit that would stop nothing, because the endpoint has no prices.

    Raises:
        ConfigError: names the endpoint and what to set.
    """
    if max_cost is not None and not has_price(config):
        raise ConfigError(
            f"endpoints.{entry}: price_input and price_output are 0, so that feedback.max_cost = "
            f"{max_cost:g} stops nothing; set the prices of a million tokens"
        )


def price(config: EndpointConfig, input_tokens: int, output_tokens: int) -> Spend:
    """``cost = (input_tokens * price_input + output_tokens * price_output) / 10**6``."""
    cost = (input_tokens * config.price_input + output_tokens * config.price_output) / 1e6
    return Spend(input_tokens=input_tokens, output_tokens=output_tokens, cost=cost)


def estimate(request: ChatRequest, config: EndpointConfig) -> Spend:
    """What a request may use at most, about: a token per 4 bytes, the image, all of max_tokens."""
    size = len(f"{request.system or ''}{request.text}".encode("utf-8", "replace"))
    image = config.image_tokens if request.image is not None else 0
    return price(config, size // 4 + _MESSAGE_TOKENS + image, request.max_tokens)


class Budget:
    """What the endpoints of a job may use together, what they used, and what is on its way.

    One event loop at a time.
    """

    def __init__(self, max_cost: float | None = None, max_tokens: int | None = None) -> None:
        self.max_cost = max_cost
        self.max_tokens = max_tokens
        self.unpriced = False
        self._spent = Spend()
        self._reserved = Spend()
        self._on_their_way = 0
        self._replies = 0
        self._failed = 0
        self._requests = 0
        self._retries: Counter[str] = Counter()
        self._released = asyncio.Event()

    async def reserve(self, spend: Spend) -> None:
        """Set aside what a request may use; waits while others that are on their way may use less.

        Raises:
            ServiceError: it does not fit, and nothing is on its way.
        """
        while self._is_over(self._spent + self._reserved + spend):
            if not self._on_their_way:
                raise ServiceError(self._reached(spend))
            self._released.clear()
            await self._released.wait()
        self._reserved += spend
        self._on_their_way += 1

    def release(self, reserved: Spend) -> None:
        """Give back what :meth:`reserve` set aside; what was used is charged before."""
        self._on_their_way -= 1
        left = self._reserved
        # Floats that are added and taken away in another order do not end at zero by themselves.
        self._reserved = (
            Spend(
                input_tokens=left.input_tokens - reserved.input_tokens,
                output_tokens=left.output_tokens - reserved.output_tokens,
                cost=left.cost - reserved.cost,
            )
            if self._on_their_way
            else Spend()
        )
        self._released.set()

    def charge(self, used: Spend) -> None:
        """Count what a reply used, readable or not."""
        self._spent += used

    def count(
        self, *, requests: int = 0, replies: int = 0, failed: int = 0, retry: str | None = None
    ) -> None:
        """Add to the totals; ``retry`` is the cause of one request that will be sent again."""
        self._requests += requests
        self._replies += replies
        self._failed += failed
        if retry is not None:
            self._retries[retry] += 1

    def usage(self) -> Usage:
        """The totals so far."""
        return Usage(
            requests=self._requests,
            replies=self._replies,
            failed=self._failed,
            retries=dict(self._retries),
            input_tokens=self._spent.input_tokens,
            output_tokens=self._spent.output_tokens,
            cost=self._spent.cost,
            unpriced=self.unpriced,
        )

    def _is_over(self, total: Spend) -> bool:
        over_cost = self.max_cost is not None and total.cost > self.max_cost * (1 + 1e-9)
        return over_cost or (self.max_tokens is not None and total.tokens > self.max_tokens)

    def _reached(self, spend: Spend) -> str:
        kept = "the replies so far are kept"
        if self.max_tokens is not None and (self._spent + spend).tokens > self.max_tokens:
            return (
                f"budget of {self.max_tokens:,} tokens reached: {self._spent.tokens:,} used, the "
                f"next request may use {spend.tokens:,}; raise feedback.max_tokens; {kept}"
            )
        return (
            f"budget of {self.max_cost:g} reached: {self._spent.cost:.4g} spent, the next request "
            f"may cost {spend.cost:.4g}; raise feedback.max_cost / --max-cost; {kept}"
        )


class Rate:
    """So many units a minute, evenly: what a second may take is not saved up for a burst."""

    def __init__(self, per_minute: float) -> None:
        self._share = max(1.0, per_minute / 60)
        self._limiter = AsyncLimiter(self._share, max(1.0, 60 / per_minute))

    async def take(self, amount: float) -> None:
        """Wait until ``amount`` may go, in pieces, for it may be more than a second's share."""
        while amount > 0:
            piece = min(amount, self._share)
            await self._limiter.acquire(piece)
            amount -= piece


class Gate:
    """Lets the requests of one endpoint go: so many at a time, at its rates, and not in a pause."""

    def __init__(
        self, config: EndpointConfig, sleep: Sleep = asyncio.sleep, clock: Clock = time.monotonic
    ) -> None:
        self._places = asyncio.Semaphore(config.concurrency)
        per_minute = (config.requests_per_minute, config.tokens_per_minute)
        self._requests, self._tokens = (Rate(n) if n is not None else None for n in per_minute)
        self._sleep = sleep
        self._clock = clock
        self._resume_at = 0.0

    def paused_since(self, sent_at: float) -> bool:
        """Whether a pause was begun by others after a request was sent."""
        return self._resume_at > sent_at

    def pause(self, seconds: float) -> None:
        """Send nothing for ``seconds`` from now; a longer pause stays."""
        self._resume_at = max(self._resume_at, self._clock() + seconds)

    @asynccontextmanager
    async def place(self, tokens: int) -> AsyncIterator[float]:
        """Hold a place while a request of about ``tokens`` is on its way; gives when it goes."""
        async with self._places:
            if self._requests is not None:
                await self._requests.take(1)
            if self._tokens is not None:
                await self._tokens.take(tokens)
            while (left := self._resume_at - self._clock()) > 0:
                await self._sleep(left)
            yield self._clock()
