"""What both clients share: the settings of a client, its requests, and when they are sent again.

A score depends on its request alone, so that whatever may have been lost is sent again: refused
connections and time-outs, 429 and 5xx, after the pause that the service asks for.
"""

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import BaseModel
from tenacity import RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from fgaif.chat.secrets import fits_header, is_loopback
from fgaif.client.answers import KEY_VARIABLE, LONGEST_WAIT_S, ScoringError, answered_error, failure
from fgaif.errors import ConfigError, DataError
from fgaif.serving.schema import (
    DEFAULT_PROMPT,
    BatchResponse,
    ModelsResponse,
    RewardResponse,
    ScoreResponse,
)
from fgaif.types import Json

SCORE, BATCH, MODELS = "/v1/score", "/v1/score/batch", "/v1/models"
GET_REWARD = "/get_reward"
_JSON = {"Content-Type": "application/json"}

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Model]):
    """A request to the service, and what its answer is read as."""

    path: str
    answer: type[Model]
    body: bytes | None = None
    """JSON to post; without it the request is a GET."""

    def http(self) -> dict[str, Any]:
        """Arguments of an HTTP client's ``request``."""
        if self.body is None:
            return {"method": "GET", "url": self.path}
        return {"method": "POST", "url": self.path, "content": self.body, "headers": _JSON}


class Picture(Protocol):
    """A decoded image, such as Pillow's, which this module does without."""

    def save(self, fp: Any, format: str) -> None:
        """Write the image as a file of the format."""


Image = str | Path | bytes | Picture
"""A path, a data URI or URL, a file's bytes, or a Pillow image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreItem:
    """One image with one text, or several texts about it."""

    image: Image
    text: str | Sequence[str]
    prompt: str = DEFAULT_PROMPT
    facts: bool = False
    min_words: int | None = None

    def body(self) -> Json:
        """The JSON of a score request.

        Raises:
            DataError: the image's file cannot be read.
        """
        text = self.text if isinstance(self.text, str) else list(self.text)
        sent: Json = {"text": text, "prompt": self.prompt, "image": encode_image(self.image)}
        return sent | {"facts": self.facts, "min_words": self.min_words}


def encode_image(image: Image) -> str:
    """An image as the service takes it: Base64 of the file's bytes, or the given data URI or URL.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(image, str) and image.startswith(("data:", "http://", "https://")):
        return image
    if isinstance(image, str | Path):
        try:
            image = Path(image).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"image {str(image)[:200]}: {reason}; give a readable file") from None
    if isinstance(image, bytes):
        return base64.b64encode(image).decode("ascii")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return encode_image(buffer.getvalue())


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Where a service is and its key, how long an attempt may take, and how many there are."""

    base_url: str
    key: str | None = field(repr=False)
    timeout_s: float
    attempts: int
    backoff_s: float

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query:
            shown = f"{url.scheme}://{url.hostname}"
            raise ConfigError(
                f"base_url {shown!r}: give an address such as http://127.0.0.1:8000, without user, "
                "password and query"
            )
        if self.key is not None and not fits_header(self.key):
            raise ConfigError(
                f"the key (key= or {KEY_VARIABLE}) holds blanks or control characters"
            )
        if self.attempts < 1 or self.timeout_s <= 0:
            raise ConfigError(
                f"attempts {self.attempts}, timeout_s {self.timeout_s}: give at least one attempt "
                "and a time-out above 0"
            )

    @property
    def headers(self) -> dict[str, str]:
        """The authorization, if there is a key."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def direct(self) -> bool:
        """The service is on this machine, where a proxy would not find it."""
        return is_loopback(self.base_url)

    @property
    def stream_url(self) -> str:
        """Where the WebSocket is."""
        return f"ws{self.base_url.removeprefix('http')}/v1/score/stream"

    def http(self) -> dict[str, Any]:
        """Arguments of an HTTP client."""
        return {
            "base_url": self.base_url,
            "headers": self.headers,
            "timeout": self.timeout_s,
            "trust_env": not self.direct,
            "limits": httpx2.Limits(max_connections=None),
        }

    def retries(self) -> dict[str, Any]:
        """Arguments of tenacity's loops."""
        backoff = wait_exponential_jitter(
            initial=self.backoff_s, max=LONGEST_WAIT_S / 4, jitter=self.backoff_s
        )

        def wait(state: RetryCallState) -> float:
            error = state.outcome and state.outcome.exception()
            asked = error.retry_after if isinstance(error, ScoringError) else None
            return backoff(state) if asked is None else asked

        return {
            "stop": stop_after_attempt(self.attempts),
            "wait": wait,
            "retry": retry_if_exception(lambda e: isinstance(e, ScoringError) and e.passing),
            "reraise": True,
        }


def client_settings(
    base_url: str, key: str | None, *, timeout_s: float, attempts: int, backoff_s: float
) -> ClientSettings:
    """Settings of a client of ``base_url``; the key's default is the environment variable's.

    Raises:
        ConfigError: an address, key or number that cannot be used.
    """
    found = (os.environ.get(KEY_VARIABLE, "") if key is None else key).strip()
    return ClientSettings(
        base_url=base_url.rstrip("/"),
        key=found or None,
        timeout_s=timeout_s,
        attempts=attempts,
        backoff_s=backoff_s,
    )


def encode(body: Json) -> bytes:
    """A request's bytes.

    Raises:
        DataError: a text that is no Unicode.
    """
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise DataError("a text holds half of a character (a lone surrogate); remove it") from None


def score_call(item: ScoreItem) -> Call[ScoreResponse]:
    """Score one image's texts; raises DataError as :meth:`ScoreItem.body`."""
    return Call(path=SCORE, answer=ScoreResponse, body=encode(item.body()))


def reward_call(
    queries: Sequence[str], prompts: Sequence[str], images: Sequence[Image], question: str | None
) -> Call[RewardResponse]:
    """OpenRLHF's request, with images; raises DataError as :func:`encode_image`."""
    pictures = [encode_image(image) for image in images]
    sent = {"query": list(queries), "prompts": list(prompts), "images": pictures}
    return Call(path=GET_REWARD, answer=RewardResponse, body=encode(sent | {"question": question}))


def models_call() -> Call[ModelsResponse]:
    """Ask which models are served."""
    return Call(path=MODELS, answer=ModelsResponse)


def start(image: Image, prompt: str) -> str:
    """The first message of a stream."""
    return encode({"image": encode_image(image), "prompt": prompt}).decode()


def delta(piece: str) -> str:
    """The message of a stream with a piece of the text."""
    return encode({"delta": piece}).decode()


class Batch:
    """Items that are sent together; those that the service was too busy for are sent again."""

    def __init__(self, items: Sequence[ScoreItem], base_url: str) -> None:
        self._where = f"{base_url}{BATCH}"
        self._bodies = dict(enumerate(item.body() for item in items))
        self._results: dict[int, ScoreResponse | ScoringError] = {}
        self.busy: ScoringError | None = None

    @property
    def results(self) -> list[ScoreResponse | ScoringError]:
        """A response or an error for each item, in order."""
        return [self._results[index] for index in sorted(self._results)]

    def call(self) -> Call[BatchResponse]:
        """The request for the items that have no final answer."""
        body = encode({"items": list(self._bodies.values())})
        return Call(path=BATCH, answer=BatchResponse, body=body)

    def take(self, answer: BatchResponse) -> None:
        """Keep the answers to ``call()``.

        Raises:
            ScoringError: some items have to be sent again; it is ``busy`` from now on.
        """
        sent = list(self._bodies)
        if len(answer.responses) != len(sent):
            counts = f"{len(answer.responses)} answers to {len(sent)} items"
            raise failure(f"{self._where}: {counts}", type="unreadable")
        self.busy = None
        for index, response in zip(sent, answer.responses, strict=True):
            if isinstance(response, ScoreResponse):
                self._results[index] = response
                del self._bodies[index]
                continue
            error = answered_error(f"{self._where}: items.{index}", response.error.model_dump())
            self._results[index] = error
            if error.passing:
                self.busy = error
            else:
                del self._bodies[index]
        if self.busy:
            raise self.busy
