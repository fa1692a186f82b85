"""What both clients share: where the service is, what is sent, and when it is sent again.

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
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx2
from tenacity import RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from fgaif.chat.secrets import is_loopback
from fgaif.client.results import KEY_VARIABLE, LONGEST_WAIT_S, ScoringError, failure, told
from fgaif.errors import ConfigError, DataError
from fgaif.serving.schema import DEFAULT_PROMPT, BatchResponse, ScoreResponse
from fgaif.types import Json

SCORE, BATCH, MODELS = "/v1/score", "/v1/score/batch", "/v1/models"
GET_REWARD = "/get_reward"


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
class Service:
    """An address with its key, and how long and how often it is asked."""

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
        if self.key is not None and not (
            self.key.isascii() and self.key.isprintable() and " " not in self.key
        ):
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


def make_service(
    base_url: str, key: str | None, *, timeout_s: float, attempts: int, backoff_s: float
) -> Service:
    """The service at ``base_url``; the key's default is the environment variable's.

    Raises:
        ConfigError: an address, key or number that cannot be used.
    """
    found = (os.environ.get(KEY_VARIABLE, "") if key is None else key).strip()
    return Service(
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


def reward_body(
    queries: Sequence[str], prompts: Sequence[str], images: Sequence[Image], question: str | None
) -> Json:
    """The JSON of OpenRLHF's request, with images."""
    pictures = [encode_image(image) for image in images]
    sent = {"query": list(queries), "prompts": list(prompts), "images": pictures}
    return sent | {"question": question}


def start(image: Image, prompt: str) -> str:
    """The first message of a stream."""
    return encode({"image": encode_image(image), "prompt": prompt}).decode()


def delta(piece: str) -> str:
    """The message of a stream with a piece of the text."""
    return encode({"delta": piece}).decode()


class Batch:
    """Items that are sent together; those that the service was too busy for are sent again."""

    def __init__(self, items: Sequence[ScoreItem]) -> None:
        self._bodies = dict(enumerate(item.body() for item in items))
        self._results: dict[int, ScoreResponse | ScoringError] = {}
        self.busy: ScoringError | None = None

    @property
    def results(self) -> list[ScoreResponse | ScoringError]:
        """A response or an error for each item, in order."""
        return [self._results[index] for index in sorted(self._results)]

    def body(self) -> bytes:
        """The request for the items that have no final answer."""
        return encode({"items": list(self._bodies.values())})

    def take(self, answer: BatchResponse, where: str) -> None:
        """Keep the answers to ``body()``.

        Raises:
            ScoringError: some items have to be sent again; it is ``busy`` from now on.
        """
        sent = list(self._bodies)
        if len(answer.responses) != len(sent):
            counts = f"{len(answer.responses)} answers to {len(sent)} items"
            raise failure(f"{where}: {counts}", type="unreadable")
        self.busy = None
        for index, response in zip(sent, answer.responses, strict=True):
            if isinstance(response, ScoreResponse):
                self._results[index] = response
                del self._bodies[index]
                continue
            error = told(f"{where}: items.{index}", response.error.model_dump())
            self._results[index] = error
            if error.passing:
                self.busy = error
            else:
                del self._bodies[index]
        if self.busy:
            raise self.busy
