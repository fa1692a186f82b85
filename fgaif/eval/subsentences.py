"""Sub-sentences for FaithScore: do they describe the image, and are they faithful to it?"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from fgaif.chat.messages import ChatRequest, PromptFile, load_prompt
from fgaif.eval.judge import PROMPTS
from fgaif.eval.vocabulary import singular, tokenize
from fgaif.feedback.segment import split_offsets
from fgaif.types import Answer, Fact

PROMPT = PROMPTS / "faithscore_stage1.txt"
LABELS = ("descriptive", "analytical")

Span = tuple[int, int]
"""Start and end of a sub-sentence in its answer's text."""

_TOKENS = 64
_TOKENS_PER_LABEL = 12
_FENCE = re.compile(r"\A\s*```\w*\s(.*?)```\s*\Z", re.DOTALL)
_LINE = re.compile(rf"\W*(\d{{1,4}})\W+({'|'.join(LABELS)})\W*", re.IGNORECASE)
_AFTER_THE_ENTITY = frozenset(
    tokenize(
        "in on at of with without near by under over behind beside above below between among "
        "around against inside outside along across through to from for into onto next that which "
        "who whose where is are was were has have"
    )
)


def sub_sentences(text: str, min_words: int) -> list[Span]:
    """Split an answer as training responses are split; pieces without words are left out."""
    spans = pairwise(split_offsets(text, min_words))
    return [(start, end) for start, end in spans if text[start:end].strip()]


def on_one_line(text: str, span: Span) -> str:
    """Return the words of a sub-sentence with single spaces."""
    return " ".join(text[slice(*span)].split())


def load_label_prompt(path: Path = PROMPT) -> PromptFile:
    """Read a prompt for stage 1, with the slot ``{sub_sentences}`` once.

    Raises:
        ConfigError: the file cannot be read or lacks the slot.
    """
    return load_prompt(path, ["sub_sentences"])


def label_request(prompt: PromptFile, texts: Sequence[str]) -> ChatRequest:
    """Ask for a label for each numbered sub-sentence."""
    labels = {
        "type": "array",
        "items": {"type": "string", "enum": list(LABELS)},
        "minItems": len(texts),
        "maxItems": len(texts),
    }
    lines = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
    return ChatRequest(
        prompt_version=prompt.version,
        subject=lines,
        text=prompt.fill(sub_sentences=lines),
        schema={
            "type": "object",
            "properties": {"labels": labels},
            "required": ["labels"],
            "additionalProperties": False,
        },
        max_tokens=_TOKENS + _TOKENS_PER_LABEL * len(texts),
    )


def read_labels(reply: str, count: int) -> tuple[bool, ...] | None:
    """Read which of ``count`` sub-sentences are descriptive; None unless each has one label.

    The reply is ``{"labels": [...]}``, in a code fence or not, or lines like "1. descriptive".
    """
    fenced = _FENCE.match(reply)
    try:
        tree = json.loads(fenced[1] if fenced else reply)
        labels = tree["labels"] if isinstance(tree, dict) else tree
    except (ValueError, KeyError, RecursionError):
        found = [match for line in reply.splitlines() if (match := _LINE.fullmatch(line))]
        if [int(match[1]) for match in found] != list(range(1, count + 1)):
            return None
        labels = [match[2].lower() for match in found]
    if not isinstance(labels, list) or len(labels) != count:
        return None
    if any(label not in LABELS for label in labels):
        return None
    return tuple(label == "descriptive" for label in labels)


def faithful(
    pieces: Sequence[str], facts: Sequence[Fact], verdicts: Mapping[str, Answer]
) -> list[bool]:
    """Say of each descriptive sub-sentence of an answer whether it is faithful.

    It is not if it names an entity whose object fact failed, or one that a failed attribute or
    relation fact of the answer names, wherever that was said. Words are compared in the singular.

    Args:
        verdicts: by the text of the fact; only "no" is a failure.
    """
    entities = {fact.text: entity(fact.text) for fact in facts if fact.kind == "object"}
    known = set(entities.values()) - {None}
    wrong: set[str | None] = set()
    for fact in facts:
        if verdicts[fact.text] == "no":
            named = {entities[fact.text]} if fact.kind == "object" else known & _words(fact.text)
            wrong |= named - {None}
    return [wrong.isdisjoint(_words(piece)) for piece in pieces]


def entity(statement: str) -> str | None:
    """Return the noun of an object fact in the singular: "There are two dogs on a mat." -> "dog".

    That is the last word before a preposition or a verb; None if there is no word.
    """
    words = [token for token in tokenize(statement) if token[0].isalnum()]
    words = words[2:] if words[:1] == ["there"] else words
    end = next((at for at, word in enumerate(words) if at and word in _AFTER_THE_ENTITY), None)
    return singular(words[:end][-1]) if words else None


def _words(text: str) -> set[str | None]:
    return {singular(token) for token in tokenize(text)}
