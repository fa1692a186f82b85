"""Choices between two answers, for a preference reward model: people's, or made of our labels.

People's rows are LLaVA-RLHF's: {"image", "conversations": [{"from", "value"}, ...], "output_1":
{"value"}, "output_2": {"value"}, "preference": 1 or 2}; outputs may be plain texts. Rows of ``fgaif
pairs`` (prompt, chosen, rejected) are read too. What is asked is the last turn of the user.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgaif.baselines.files import json_rows, turns_of
from fgaif.baselines.pairs import Pairing, make_pairs, score_labels
from fgaif.config import RewardShapeConfig
from fgaif.data.prompts import Skipped, skipped_warning
from fgaif.data.rows import text_of, whole_text
from fgaif.errors import DataError
from fgaif.feedback.external import ResponseMaker
from fgaif.reward.preference import Choice
from fgaif.types import Json, LabeledResponse, Response

_COLUMNS = (
    *("id", "image", "images", "conversations", "output_1", "output_2", "preference"),
    *("prompt", "chosen", "rejected"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Usable choices in order, and what was left out."""

    source: str
    rows: tuple[Choice, ...]
    skipped: tuple[Skipped, ...] = ()
    pairing: Pairing | None = None

    def warning(self) -> str:
        """Say how many were left out and why; empty if none was."""
        if self.pairing is not None:
            return self.pairing.summary()
        return skipped_warning(self.source, len(self.rows), self.skipped, 3)

    def counts(self) -> dict[str, int]:
        """How many there are, and were left out."""
        left = self.pairing.counts if self.pairing is not None else {"skipped": len(self.skipped)}
        return {"pairs": len(self.rows), **left}


def choices_of_labels(
    labeled: Iterable[LabeledResponse], shape: RewardShapeConfig, per_prompt: int = 1
) -> Choices:
    """The response with fewer hallucinations is better; ties are left out."""
    rows = list(labeled)
    pairing = make_pairs(score_labels(rows, "hallucinations", shape), per_prompt=per_prompt)
    known: dict[tuple[str, str, str], Response] = {}
    for row in rows:
        prompt = row.response.prompt
        key = (prompt.image.sha256, prompt.text, row.response.text)
        known.setdefault(key, row.response)

    def sampled(prompt: Any, text: str) -> Response:
        return known[prompt.image.sha256, prompt.text, text]

    found = tuple(
        Choice(
            better=sampled(pair.chosen.prompt, pair.chosen.text),
            worse=sampled(pair.rejected.prompt, pair.rejected.text),
        )
        for pair in pairing.pairs
    )
    return Choices(source="the labels", rows=found, pairing=pairing)


def read_choices(path: Path, tokenizer: Any, *, root: Path | None, max_pixels: int) -> Choices:
    """Read people's choices from a .json, .jsonl or .parquet file.

    Args:
        tokenizer: the policy's, a ``PreTrainedTokenizerFast``.
        root: folder that image paths start from and must lie in; default: the file's folder.

    Raises:
        DataError: the file cannot be read, or no row can be used.
    """
    maker = ResponseMaker(root or path.parent, tokenizer, max_pixels)
    found: list[Choice] = []
    for number, row in json_rows(path, _COLUMNS):
        where = f"{path}:{number}"
        with maker.skipping(where):
            found += _choice(where, f"{path.stem}-{number}", row, maker)
    choices = Choices(source=str(path), rows=tuple(found), skipped=tuple(maker.skipped))
    if not found:
        raise DataError(choices.warning() or f"{path}: no rows; add some")
    return choices


def _choice(where: str, name: str, row: Any, maker: ResponseMaker) -> Iterator[Choice]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: {row!r:.60}: a row must be an object")
    asked, better, worse = _texts(where, row)
    if better == worse:
        raise DataError(f"{where}: both answers are the same text")
    images = row.get("images", row.get("image"))
    image = images[0] if isinstance(images, list) and len(images) == 1 else images
    if not isinstance(image, str):
        raise DataError(f"{where}: image {images!r:.60}: give one image by its path")
    first = maker.make(where, id=name, image=image, prompt=asked, text=better)
    second = first and maker.make(where, id=name, image=image, prompt=asked, text=worse)
    if first is not None and second is not None:
        yield Choice(better=first, worse=second)


def _texts(where: str, row: Json) -> tuple[str, str, str]:
    """What was asked, the better and the worse answer."""
    if "preference" not in row:
        chosen, rejected = (_said(where, row, name) for name in ("chosen", "rejected"))
        return _said(where, row, "prompt"), chosen, rejected
    if row["preference"] not in (1, 2):
        raise DataError(f"{where}: preference {row['preference']!r}: expected 1 or 2")
    turns = turns_of(where, "conversations", row.get("conversations"))
    asked = [text for role, text in turns if role == "user"]
    if not asked:
        raise DataError(f"{where}: conversations: no turn of the user")
    one, two = (_output(where, row, name) for name in ("output_1", "output_2"))
    return asked[-1], *((one, two) if row["preference"] == 1 else (two, one))


def _said(where: str, row: Json, column: str) -> str:
    if not isinstance(row.get(column), list):
        return text_of(where, row, column)
    turns = turns_of(where, column, row[column])
    if not turns:
        raise DataError(f"{where}: {column}: no turn")
    return turns[-1][1]


def _output(where: str, row: Json, column: str) -> str:
    value = row.get(column)
    text = value.get("value") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: column `{column}`: {value!r:.60}: expected a text or its value")
    return whole_text(where, column, text)
