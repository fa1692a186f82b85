"""Errors of the HTTP API: status, type, message and field; never a path or a traceback."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from fgaif.errors import DataError, FgaifError
from fgaif.serving.schema import Error, ErrorResponse, ErrorType

_WRONG_TYPE = {"string_type", "list_type"}
_NAME = re.compile(r"[a-z_]+")
_NAMED = re.compile(r"([a-z_]+): ")
_DECODER = re.compile(r"cannot be decoded \(.*\)", re.DOTALL)
_SCHEMA_WORDS = {"body"}
RETRY_AFTER_S = 1


class ApiError(FgaifError):
    """An answer other than success; the middleware sends it as an ``ErrorResponse``."""

    def __init__(
        self,
        status: int,
        type: ErrorType,
        message: str,
        *,
        field: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type: ErrorType = type
        self.field = field
        self.retry_after = retry_after

    def body(self) -> ErrorResponse:
        """The answer's body."""
        return ErrorResponse(error=Error(type=self.type, message=str(self), field=self.field))

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body().model_dump(), self.status, headers)

    def inside(self, prefix: str) -> "ApiError":
        """The same failure of a part of a larger request."""
        field = ".".join(part for part in (prefix, self.field) if part)
        return ApiError(self.status, self.type, str(self), field=field or None)


def invalid(message: str, field: str | None = None) -> ApiError:
    """A request that can be read but not served: 422."""
    return ApiError(422, "invalid_request", message, field=field)


def image_problem(error: DataError) -> str:
    """What is wrong with an image, without the decoder's own words."""
    told = _DECODER.sub("cannot be decoded", str(error))
    return told.replace("data.max_image_pixels", "serve.max_image_pixels")


def unauthorized() -> ApiError:
    """No key, or a wrong one: 401."""
    return ApiError(401, "unauthorized", "send the header Authorization: Bearer KEY")


def overloaded() -> ApiError:
    """More requests than the queue takes: 429."""
    return ApiError(
        429, "overloaded", "too many requests at once; try again", retry_after=RETRY_AFTER_S
    )


def unavailable() -> ApiError:
    """No replica can answer now: 503."""
    return ApiError(
        503, "overloaded", "the models are not ready; try again", retry_after=RETRY_AFTER_S
    )


def from_validation(errors: Sequence[Any] | ValidationError) -> ApiError:
    """The error of a body that does not validate; it does not repeat the content."""
    found = errors.errors(include_url=False) if isinstance(errors, ValidationError) else errors
    # Of a union every branch complains: the one of the right type says what is wrong.
    told = [item for item in found if item["type"] not in _WRONG_TYPE] or found
    first = told[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_request", "the body is not valid JSON")
    if first["type"] == "string_pattern_mismatch":
        return invalid("nothing but white space", _dotted(first["loc"]))
    message = str(first["msg"]).removeprefix("Value error, ")
    named = _NAMED.match(message) if first["type"] == "value_error" else None
    return invalid(message, named[1] if named else _dotted(first["loc"]))


def _dotted(location: Iterable[Any]) -> str | None:
    """Field names and indexes; names of types and of union branches are left out."""
    parts = [
        str(part)
        for part in location
        if isinstance(part, int) or (_NAME.fullmatch(part) and part not in _SCHEMA_WORDS)
    ]
    return ".".join(parts) or None
