"""Reads the service's answers: typed results, or exceptions with the service's message."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, RootModel, ValidationError
from websockets.exceptions import InvalidStatus

from fgaif.chat.secrets import redact, redirected_base
from fgaif.errors import ConfigError, FgaifError
from fgaif.serving.schema import (
    ScoreResponse,
    SegmentOut,
    StreamReady,
    StreamResult,
    StreamSegment,
    TextResult,
)
from fgaif.types import Kind

KEY_VARIABLE = "FGAIF_SERVE_KEY"
LONGEST_WAIT_S = 60.0
"""A service that asks for a longer pause is not waited for."""

_PASSING = {"connection", "overloaded", "timeout", "internal"}
_REFUSED = {"invalid_request", "unauthorized", "too_large"}

Model = TypeVar("Model", bound=BaseModel)
Event = SegmentOut | TextResult
"""What a stream yields: sub-sentences, and at its end the whole text."""


class _StreamEvent(RootModel[StreamSegment | StreamResult]):
    pass


class ScoringError(FgaifError, RuntimeError):
    """The service gave no score; ``status`` and ``type`` are its own where it answered.

    ``field`` names the part of the request that the service speaks of; ``retry_after`` is the
    pause in seconds that it asks for; ``passing`` says that another try may succeed.
    """

    status: int | None = None
    type: str = "connection"
    field: str | None = None
    retry_after: float | None = None
    passing: bool = False


class ScoringRefused(ScoringError, ValueError):
    """The request is at fault and would be refused again (4xx other than 429)."""


def read(response: httpx2.Response, model: type[Model]) -> Model:
    """The answer as ``model``.

    Raises:
        ScoringError: any other status than 200, or an answer that does not fit the model.
    """
    if response.status_code != 200:
        content, headers = response.content, response.headers
        raise _refusal(str(response.url), response.status_code, content, headers)
    return _parse(str(response.url), response.content, model)


def read_ready(where: str, message: str | bytes) -> None:
    """Check the first message of a stream; raises as :func:`read_event`."""
    _parse(where, _no_error(where, message), StreamReady)


def read_event(where: str, message: str | bytes) -> Event:
    """The sub-sentence, or the whole text, of a message of a stream.

    Raises:
        ScoringError: the message holds an error, or nothing that is known.
    """
    _no_error(where, message)
    event = _parse(where, message, _StreamEvent).root
    return event.segment if isinstance(event, StreamSegment) else event.result


def failure(
    message: str,
    *,
    status: int | None = None,
    type: str = "connection",
    field: str | None = None,
    retry_after: float | None = None,
) -> ScoringError:
    """The error of a request that got no score; keys are taken out of the message."""
    passing = type in _PASSING or status == 429 or (status or 0) >= 500
    refused = type in _REFUSED or (400 <= (status or 0) < 500 and not passing)
    error = (ScoringRefused if refused else ScoringError)(redact(message))
    error.status, error.type, error.field = status, type, field
    error.retry_after = retry_after
    error.passing = passing and (retry_after or 0) <= LONGEST_WAIT_S
    return error


def answered_error(where: str, error: Any, status: int | None = None, **more: Any) -> ScoringError:
    """The error of an answer's ``{"error": {"type", "message", "field"}}``."""
    error = error if isinstance(error, dict) else {"message": str(error)}
    type, name = str(error.get("type", "unreadable")), error.get("field")
    said = " ".join(str(error.get("message", "no message")).split())[:500]
    fix = f"; give key= or set {KEY_VARIABLE}" if status == 401 or type == "unauthorized" else ""
    at = f"{name}: " if name else ""
    code = f"{status} " if status else ""
    message = f"{where}: {code}{type}: {at}{said}{fix}"
    return failure(message, status=status, type=type, field=name, **more)


def unreached(where: str, error: Exception, timeout_s: float) -> ScoringError:
    """The error of a connection that could not be made, broke or took too long."""
    if isinstance(error, httpx2.TimeoutException | TimeoutError):
        return failure(f"{where}: no answer within {timeout_s:g} s", type="timeout")
    return failure(f"{where}: {type(error).__name__}: {error}; see that the service runs")


def rewards(answer: ScoreResponse | ScoringError, kind: Kind | None) -> list[float]:
    """The reward of each text, total or of one kind; an error is raised."""
    if isinstance(answer, ScoringError):
        raise answer
    if unknown := kind is not None and [t for t in answer.results if kind not in t.rewards]:
        raise ConfigError(
            f"kind {kind!r}: the service scores {', '.join(unknown[0].rewards)}; give one of these"
        )
    return [text.total if kind is None else text.rewards[kind] for text in answer.results]


def denied(where: str, error: InvalidStatus) -> ScoringError:
    """The error of a WebSocket that was not opened."""
    response = error.response
    return _refusal(where, response.status_code, bytes(response.body or b""), response.headers)


def _refusal(where: str, status: int, body: bytes, headers: Mapping[str, str]) -> ScoringError:
    if 300 <= status < 400:
        target = redirected_base(where, headers.get("location", ""))
        message = (
            f"{where}: {status}: redirects to {target}, where nothing is sent: images and the key "
            "go only to the address that was given; if it is the right one give it as base_url"
        )
        return failure(message, status=status, type="redirect")
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        # Not our answer but one of a proxy before it.
        text = body[:200].decode("utf-8", "replace")
        error = {"type": f"HTTP {status}", "message": text}
    return answered_error(where, error, status, retry_after=_pause(headers))


def _no_error(where: str, message: str | bytes) -> str | bytes:
    try:
        answer = json.loads(message)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and "error" in answer:
        raise answered_error(where, answer["error"])
    return message


def _parse(where: str, content: str | bytes, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise failure(
            f"{where}: not an answer of this version ({at}: {first['msg']}); see that service and "
            "client are of the same version",
            type="unreadable",
        ) from None


def _pause(headers: Mapping[str, str]) -> float | None:
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None
