"""A chat model behind an OpenAI-compatible API: retries, limits and fallbacks around one client.

ask -> image as data URI -> [ budget -> gate (places, rates, pauses) -> send ] -> Reply
                              ^------------- again, after a pause ---------'
"""

import asyncio
import logging
import time
from urllib.parse import urlsplit

import httpx2
import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from fgaif.chat.dialect import (
    Dialect,
    Unreadable,
    arguments,
    decode,
    only_reasoning,
    read_reply,
    read_usage,
)
from fgaif.chat.failures import Failure, classify, one_line
from fgaif.chat.images import DataUris
from fgaif.chat.limits import (
    Budget,
    Clock,
    Gate,
    Sleep,
    Spend,
    check_prices,
    estimate,
    has_price,
    price,
)
from fgaif.chat.messages import ChatRequest, Reply, RequestFailed
from fgaif.chat.secrets import is_loopback, read_key, redact_logs
from fgaif.config import EndpointConfig
from fgaif.data.images import MAX_PIXELS
from fgaif.errors import DataError, ServiceError

log = logging.getLogger(__name__)

_LONGEST_BACKOFF_S = 60.0


class _Failed(Exception):
    """One try without a reply, on its way to the retries."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class Endpoint:
    """The entry ``endpoints.<entry>`` of the configuration, as a chat model.

    One per process and event loop; ``budget`` is shared by all endpoints of a job. ``name`` has no
    port: a local server that is started again on another one continues the same replies.

    Raises:
        ConfigError: no key, or a cost limit without prices.
    """

    def __init__(
        self,
        entry: str,
        config: EndpointConfig,
        budget: Budget,
        *,
        max_image_pixels: int = MAX_PIXELS,
        sleep: Sleep = asyncio.sleep,
        clock: Clock = time.monotonic,
    ) -> None:
        check_prices(entry, config, budget.max_cost)
        budget.unpriced |= not has_price(config)
        settings = f"{config.structured},side={config.max_image_side},logprobs={config.logprobs}"
        self.name = f"{config.model}@{urlsplit(config.base_url).hostname}[{settings}]"
        self.config = config
        self._entry = f"endpoints.{entry}"
        self._where = f"{self._entry} ({config.model} at {config.base_url})"
        self._budget = budget
        self._gate = Gate(config, sleep, clock)
        self._sleep = sleep
        self._uris = DataUris(
            config.max_image_side, max_image_pixels, original=config.original_images
        )
        self._client = _client(read_key(entry, config), config)
        self._dialect = Dialect(
            structured=config.structured, top_logprobs=20 if config.logprobs else 0
        )
        self._backoff = wait_exponential_jitter(
            initial=config.backoff_s, max=_LONGEST_BACKOFF_S, jitter=config.backoff_s
        )
        # One wave of failures, all that were on their way, is not yet a row.
        self._breaker = max(config.breaker, config.concurrency + 1)
        self._failures = 0
        self._stopped: str | None = None
        self._said_reasoning = False
        redact_logs()

    async def ask(self, request: ChatRequest) -> Reply:
        """Return the reply; raises like :meth:`ChatModel.ask`."""
        self._check()
        try:
            image = await self._uris.get(request.image) if request.image else None
        except DataError as error:
            self._budget.count(failed=1)
            raise RequestFailed(one_line(str(error))) from None
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.config.attempts),
            wait=self._wait,
            retry=retry_if_exception(_may_retry),
            before_sleep=self._before_sleep,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return await retrying(self._attempt, request, image, estimate(request, self.config))
        except _Failed as failed:
            failure = failed.failure
        # Raised out here so that no client error, which may hold the key, is its context.
        self._budget.count(failed=1)
        tries = retrying.statistics.get("attempt_number", 1)
        raise RequestFailed(f"{self._where}: {failure.reason} (tries: {tries})")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _attempt(self, request: ChatRequest, image: str | None, spend: Spend) -> Reply:
        self._check()
        try:
            await self._budget.reserve(spend)
        except ServiceError as error:
            raise self._stop(str(error)) from None
        try:
            async with self._gate.place(spend.tokens) as sent_at:
                self._check()
                outcome = await self._send(request, image, spend)
        finally:
            self._budget.release(spend)
        if isinstance(outcome, Failure):
            raise self._failed(outcome, sent_at)
        self._failures = 0
        return outcome

    async def _send(self, request: ChatRequest, image: str | None, spend: Spend) -> Reply | Failure:
        while True:
            dialect = self._dialect
            sent = arguments(request, image, self.config.model, dialect)
            self._budget.count(requests=1)
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    # Typed calls check and copy every argument, a third of a request's work.
                    response = await self._client.post(
                        "/chat/completions", body=sent, cast_to=httpx2.Response
                    )
            except (openai.APIError, TimeoutError, UnicodeEncodeError) as error:
                failure = classify(error, self.config)
            else:
                return self._read(response.content, request, spend)
            simpler = dialect.without(failure.refused, sent) if failure.refused else None
            if simpler is None:
                return failure
            if self._dialect is dialect:  # else a request beside this one has found out already
                self._dialect = simpler
                log.warning("%s: %s; from now on: %s", self._where, failure.reason, simpler)

    def _read(self, content: bytes, request: ChatRequest, spend: Spend) -> Reply | Failure:
        used = spend  # what cannot be read may have cost all that it was estimated at
        try:
            data = decode(content)
            used = price(self.config, *(read_usage(data) or (spend.input_tokens, 0)))
            reply = read_reply(data, request, spend.input_tokens)
            used = price(self.config, reply.input_tokens, reply.output_tokens)
        except Unreadable as error:
            return Failure(cause="unreadable", reason=one_line(str(error)))
        finally:
            self._budget.charge(used)
        self._budget.count(replies=1)
        if only_reasoning(data, reply) and not self._said_reasoning:
            self._said_reasoning = True
            log.warning(
                "%s: a reply of %d tokens holds reasoning or nothing, and no answer (the limit of "
                "such a request is %d): it counts as unreadable and is paid for; turn the model's "
                "thinking off at its server, or name a model that answers at once",
                self._where,
                reply.output_tokens,
                request.max_tokens,
            )
        return reply

    def _failed(self, failure: Failure, sent_at: float) -> Exception:
        if failure.action == "stop":
            return self._stop(f"{self._where}: {failure.reason}")
        # All requests on their way meet the same rate limit: it counts once.
        if not (failure.action == "pause" and self._gate.paused_since(sent_at)):
            self._failures += 1
        if self._failures >= self._breaker:
            cure = "see that the server works"
            if failure.refused:
                cure = (
                    f"if that is about log-probs set {self._entry}.logprobs=false, if about the "
                    f"format of replies {self._entry}.structured=text"
                )
            return self._stop(
                f"{self._where}: {self._failures} failures in a row, the last: {failure.reason}; "
                f"{cure}, then resume; the replies so far are kept"
            )
        return _Failed(failure)

    def _wait(self, state: RetryCallState) -> float:
        wait = _failure(state).retry_after
        return self._backoff(state) if wait is None else wait

    def _before_sleep(self, state: RetryCallState) -> None:
        failure = _failure(state)
        self._budget.count(retry=failure.cause)
        if failure.action == "pause" and state.next_action is not None:
            self._gate.pause(state.next_action.sleep)

    def _stop(self, message: str) -> ServiceError:
        self._stopped = self._stopped or message
        return ServiceError(self._stopped)

    def _check(self) -> None:
        if self._stopped is not None:
            raise ServiceError(self._stopped)


def _may_retry(error: BaseException) -> bool:
    return isinstance(error, _Failed) and error.failure.action != "fail"


def _failure(state: RetryCallState) -> Failure:
    error = state.outcome and state.outcome.exception()
    assert isinstance(error, _Failed), "nothing else is retried"
    return error.failure


def _client(key: str, config: EndpointConfig) -> openai.AsyncOpenAI:
    """One client, without its own retries and time-outs; a proxy is not asked for this machine.

    Redirects are not followed: they would take images to an address that nobody has named.
    """
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=config.concurrency)
    return openai.AsyncOpenAI(
        api_key=key,
        base_url=config.base_url,
        timeout=None,
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(
            limits=limits, trust_env=not is_loopback(config.base_url), follow_redirects=False
        ),
    )
