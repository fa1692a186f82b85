"""Atomic facts of any English, from a language model that answers in JSON.

One request per response: all its segments, numbered, with the whole response as context (FGAIF,
step 1). What comes back is checked strictly; a reply that cannot be read makes every segment of the
response malformed, so that its labels are UNKNOWN and never invented.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fgaif.errors import ConfigError
from fgaif.feedback.facts import ExtractedFacts
from fgaif.types import KINDS, Fact, Json, Response, Segment

PROMPT = Path(__file__).parent / "prompts" / "facts.txt"
_SEGMENTS = "{segments}"
_MAX_FACTS = 8
_MAX_LENGTH = 160
_TOKENS_PER_SEGMENT = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A text prompt whose answer must satisfy a JSON schema."""

    prompt: str
    schema: Json
    max_tokens: int


TextModel = Callable[[Sequence[TextRequest]], list[str]]
"""Returns one answer per request, in order; it raises if the model cannot be asked at all."""


class ModelFacts:
    """Extractor over any language model with JSON output."""

    def __init__(self, model: TextModel, *, model_id: str, prompt_file: Path = PROMPT) -> None:
        self._model = model
        try:
            self._prompt = prompt_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"{prompt_file}: {error.strerror}; give a text file") from error
        if self._prompt.count(_SEGMENTS) != 1:
            raise ConfigError(f"{prompt_file}: must hold {_SEGMENTS} once, where the text goes")
        digest = hashlib.sha256(self._prompt.encode()).hexdigest()[:8]
        self.name = f"{model_id} {prompt_file.stem}-{digest}"

    def extract(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[ExtractedFacts]:
        """Ask for the facts of every response that has segments."""
        asked = [i for i, parts in enumerate(segments) if parts]
        requests = [self._request(responses[i], segments[i]) for i in asked]
        answers = dict(zip(asked, self._model(requests) if requests else [], strict=True))
        return [
            read_facts(answers[i], len(parts)) if i in answers else ExtractedFacts(facts=())
            for i, parts in enumerate(segments)
        ]

    def _request(self, response: Response, segments: Sequence[Segment]) -> TextRequest:
        lines = [
            f"{number}. {' '.join(response.text[s.char_start : s.char_end].split())}"
            for number, s in enumerate(segments, start=1)
        ]
        return TextRequest(
            prompt=self._prompt.replace(_SEGMENTS, "\n".join(lines)),
            schema=facts_schema(len(segments)),
            max_tokens=_TOKENS_PER_SEGMENT * len(segments),
        )


def facts_schema(segments: int) -> Json:
    """JSON schema of an answer: per segment and kind a list of short statements."""
    statement = {"type": "string", "minLength": 1, "maxLength": _MAX_LENGTH}
    statements = {"type": "array", "items": statement, "maxItems": _MAX_FACTS}
    entry = {
        "type": "object",
        "properties": dict.fromkeys(KINDS, statements),
        "required": list(KINDS),
        "additionalProperties": False,
    }
    entries = {"type": "array", "items": entry, "minItems": segments, "maxItems": segments}
    return {
        "type": "object",
        "properties": {"segments": entries},
        "required": ["segments"],
        "additionalProperties": False,
    }


def read_facts(answer: str, segments: int) -> ExtractedFacts:
    """Read an answer; anything but one well-formed entry per segment makes all malformed."""
    try:
        entries = json.loads(answer)["segments"]
        if len(entries) != segments:
            raise ValueError(f"{len(entries)} entries for {segments} segments")
        facts = [
            Fact(kind=kind, text=text, segment=index)
            for index, entry in enumerate(entries)
            for kind in KINDS
            for text in _statements(entry[kind])
        ]
    except (ValueError, KeyError, TypeError):
        return ExtractedFacts(facts=(), malformed=tuple(range(segments)))
    return ExtractedFacts(facts=tuple(facts))


def _statements(values: Sequence[str]) -> list[str]:
    """Distinct statements without surrounding white space; empty ones are left out."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("expected a list of strings")
    return list(dict.fromkeys(text for value in values if (text := " ".join(value.split()))))
