"""What is asked of a chat model and what comes back: one user message, at most one image."""

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from fgaif.errors import ConfigError, FgaifError, ServiceError
from fgaif.types import ImageRef, Json

_SLOT = re.compile(r"\{(\w+)\}")


T = TypeVar("T")


class RequestFailed(FgaifError, RuntimeError):
    """One request got no reply, retries included; the others may go on. One line, no secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One question to a chat model.

    ``prompt_version`` names the prompt file and its digest; ``subject`` is what the question is
    about (a fact, the segments of a response, a benchmark item), for people who read the store.
    ``attempt`` counts from 0 the times that the same question was put because the reply before
    could not be read; from 1 on a model answers at a temperature above 0. ``yes_no`` asks for the
    log-probs of the first token where the model has them.
    """

    prompt_version: str
    subject: str
    text: str
    image: ImageRef | None = None
    system: str | None = None
    schema: Json | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    yes_no: bool = False
    attempt: int = 0

    def key(self, model: str) -> str:
        """SHA-256 of all that the reply depends on: the model, the texts, the image's content."""
        fields = [
            *(model, self.prompt_version, self.subject, self.attempt, self.text, self.system),
            *(self.image.sha256 if self.image else None, self.schema),
            *(self.max_tokens, self.temperature, self.yes_no),
        ]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A model's reply. ``cut`` says that it ended at ``max_tokens``.

    ``first_token`` holds the alternatives of the first token with their log-probs, best first;
    empty where the model does not give them.
    """

    text: str
    cut: bool = False
    first_token: tuple[tuple[str, float], ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0


class ChatModel(Protocol):
    """Anything that answers chat requests."""

    @property
    def name(self) -> str:
        """Model and whatever else of it changes the replies; part of every stored key."""

    async def ask(self, request: ChatRequest) -> Reply:
        """Return the reply.

        Raises:
            RequestFailed: this request got no reply, after all retries.
            ServiceError: the model cannot be asked at all (key, quota, budget, address).
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """A prompt's text with named slots in braces; ``version`` is its file's name and digest."""

    version: str
    text: str

    def fill(self, **slots: str) -> str:
        """Put the values into their slots, each exactly as it is."""
        # In one pass, so that a value which looks like a slot stays as it is.
        return _SLOT.sub(lambda slot: slots.get(slot[1], slot[0]), self.text)


def load_prompt(
    path: Path, slots: Sequence[str], fixed: Mapping[str, str] | None = None
) -> PromptFile:
    """Read a prompt file that holds each of ``slots`` exactly once, as ``{slot}``.

    ``fixed`` are values of other slots, the same in every request, which the file may hold; they
    are put in at once and count in the version.

    Raises:
        ConfigError: the file cannot be read, or a slot is missing or there twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt {path}: cannot be read ({error}); give a text file") from error
    return prompt_of(text, slots, str(path), path.stem, fixed)


def prompt_of(
    text: str,
    slots: Sequence[str],
    where: str,
    name: str,
    fixed: Mapping[str, str] | None = None,
) -> PromptFile:
    """Make a prompt of a text as :func:`load_prompt` does; ``where`` stands in its errors."""
    whole = _SLOT.sub(lambda slot: (fixed or {}).get(slot[1], slot[0]), text)
    for slot in slots:
        if whole.count(f"{{{slot}}}") != 1:
            raise ConfigError(
                f"prompt {where}: holds {{{slot}}} {whole.count(f'{{{slot}}}')} times; put it once"
            )
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return PromptFile(version=f"{name}-{digest}", text=whole)


async def gather_all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Wait for all, also after one failed, so that no reply on its way is thrown away.

    Raises:
        ServiceError: of several failures the one that says why nothing can be asked.
    """
    results = await asyncio.gather(*calls, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    for failure in sorted(failures, key=lambda error: not isinstance(error, ServiceError)):
        raise failure
    return [result for result in results if not isinstance(result, BaseException)]
