"""What a failed request means: try again, pause everything, give this one up, or stop the job."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

import openai

from fgaif.chat.secrets import redact, redirected_base
from fgaif.config import EndpointConfig

LONGEST_PAUSE_S = 900.0
"""A server that wants a longer pause than this stops the job, which is resumed later."""

_RETRIED = {408: "timeout", 409: "conflict", 429: "rate limit"}

# Codes of errors that no waiting cures, though they come as "too many requests".
_NO_MONEY = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request got no reply, in one line without keys, and what follows from it.

    ``cause`` is a word for counts. ``retry_after`` is the pause in seconds that the server asks
    for. ``refused`` holds what a server wrote that did not accept the request as it was put.
    """

    cause: str
    reason: str
    action: Literal["retry", "pause", "fail", "stop"] = "retry"
    retry_after: float | None = None
    refused: str = ""


def classify(error: Exception, config: EndpointConfig) -> Failure:
    """Tell what an error of the API client means."""
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Failure(cause="timeout", reason=f"no reply within {config.timeout_s:g} s")
    if isinstance(error, openai.APIStatusError):
        return _status(error, config)
    if isinstance(error, UnicodeEncodeError):
        reason = "the text holds half of a character (a lone surrogate)"
        return Failure(cause="request", reason=reason, action="fail")
    cause = error.__cause__ or error
    return Failure(cause="connection", reason=one_line(f"{type(cause).__name__}: {cause}"))


def one_line(text: str, limit: int = 300) -> str:
    """Text without keys and line breaks, cut at ``limit`` characters."""
    text = " ".join(redact(text).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: ``retry-after-ms``, or ``retry-after`` as number or date.

    A date counts from the server's own clock where it is given. None if there is neither.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    until = _date(headers.get("retry-after", ""))
    if until is None:
        return None
    now = _date(headers.get("date", "")) or datetime.now(UTC)
    return max(0.0, (until - now).total_seconds())


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _status(error: openai.APIStatusError, config: EndpointConfig) -> Failure:
    status, body = error.status_code, error.body
    if 300 <= status < 400:
        return _moved(error)
    message = body.get("message") if isinstance(body, dict) else None
    said = message if isinstance(message, str) else str(body or "")
    reason = one_line(f"HTTP {status}: {said}")
    if fix := _fix(status, {error.code, error.type}, config):
        return Failure(cause=f"HTTP {status}", reason=f"{reason}; {fix}", action="stop")
    if status not in _RETRIED and status < 500:
        refused = redact(f"{error.param or ''} {said}") if status in (400, 422) else ""
        return Failure(cause=f"HTTP {status}", reason=reason, action="fail", refused=refused)
    wait = retry_after(error.response.headers)
    if wait is not None and wait > LONGEST_PAUSE_S:
        reason = f"{reason}; the server asks to wait {wait:,.0f} s: resume the job then"
        return Failure(cause=f"HTTP {status}", reason=reason, action="stop")
    return Failure(
        cause=_RETRIED.get(status, f"HTTP {status}"),
        reason=reason,
        action="pause" if status == 429 or wait is not None else "retry",
        retry_after=wait,
    )


def _moved(error: openai.APIStatusError) -> Failure:
    response = error.response
    target = redirected_base(str(response.url), response.headers.get("location", ""))
    reason = (
        f"HTTP {error.status_code}: redirects to {target}, where nothing is sent: images and keys "
        "go only to the address that is configured; if it is the right one set base_url to it"
    )
    return Failure(cause="redirect", reason=one_line(reason, 600), action="stop")


def _fix(status: int, codes: set[str | None], config: EndpointConfig) -> str | None:
    key = config.api_key_file or f"environment variable {config.api_key_env}"
    if status == 401:
        return f"the key is wrong or missing: correct {key}"
    if status == 403:
        return f"the key may not use {config.model!r}: correct {key}, the model or base_url"
    if status == 404:
        return f"no model {config.model!r} at {config.base_url}: correct model or base_url"
    if status == 402 or (status == 429 and codes & _NO_MONEY):
        return f"the quota is spent: add credit to the account of {key}, then resume"
    return None
