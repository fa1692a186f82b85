"""Rows of benchmark files, JSON Lines or one JSON list, each with its place for messages."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgaif.errors import DataError
from fgaif.types import Json

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One object of a file; ``where`` is ``FILE:LINE``, or ``FILE: item N`` of a list (from 1)."""

    where: str
    data: Json

    def text(self, *keys: str, empty: bool = False) -> str:
        """Return the text under the first of ``keys`` that is there.

        Raises:
            DataError: none is there, or it is no text, or blank where ``empty`` is False.
        """
        key, value = self._first(keys)
        if isinstance(value, str) and (empty or value.strip()):
            return value
        wanted = "a text" if empty else "a text that is not empty"
        raise self.wrong(key, value, wanted)

    def identity(self, *keys: str) -> str:
        """Return the number or text under the first of ``keys`` that is there, as text.

        A whole number written as 1.0, as tables of numbers are saved, is "1".

        Raises:
            DataError: none is there, or it is neither.
        """
        key, value = self._first(keys)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip():
            return str(value)
        raise self.wrong(key, value, "a number or a text that is not empty")

    def shown(self, *keys: str) -> str:
        """Return the text under the first of ``keys`` that holds any, texts of a list in lines.

        For what people only look at: anything else is "", never an error.
        """
        for key in keys:
            value = self.data.get(key)
            lines = value if isinstance(value, list) else [value]
            if text := "\n".join(line for line in lines if isinstance(line, str)):
                return text
        return ""

    def texts(self, key: str) -> list[str]:
        """Return a list of texts; one text stands for a list of one.

        Raises:
            DataError: the key is missing or holds something else.
        """
        key, value = self._first([key])
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(item, str) for item in values):
            return values
        raise self.wrong(key, value, "a list of texts")

    def repeats(self, other: "Row") -> bool:
        """Whether the row says what another one says; the id of the answer itself may differ."""
        own, theirs = ({**row.data, "answer_id": None} for row in (self, other))
        return own == theirs

    def wrong(self, key: str, value: object, wanted: str) -> DataError:
        """Return the error for a value that cannot be used."""
        return DataError(f"{self.where}: key `{key}`: {value!r:.80}: expected {wanted}")

    def _first(self, keys: tuple[str, ...] | list[str]) -> tuple[str, Any]:
        for key in keys:
            if key in self.data:
                return key, self.data[key]
        names = " or ".join(f"`{key}`" for key in keys)
        found = ", ".join(self.data) or "no keys"
        raise DataError(f"{self.where}: no key {names}, only {found}; rename or add it")


def warn_of_repeats(source: str, count: int) -> None:
    """Say that ``count`` rows of a file were there before and counted once; nothing if none was."""
    if count:
        log.warning("%s: %d rows repeat an earlier one: counted once", source, count)


def read_rows(path: Path) -> list[Row]:
    """Read the objects of a .json list or of a JSON Lines file, whichever it is.

    Raises:
        DataError: the file cannot be read, is not JSON, holds no rows or one that is no object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a JSON or JSONL file") from error
    rows = _items(path, text) if text.lstrip().startswith("[") else _lines(path, text)
    if not rows:
        raise DataError(f"{path}: no rows; give a file with at least one object")
    return rows


def _items(path: Path, text: str) -> list[Row]:
    items = _loads(str(path), text)
    return [_row(f"{path}: item {number}", item) for number, item in enumerate(items, start=1)]


def _lines(path: Path, text: str) -> list[Row]:
    # Not splitlines(): JSON allows U+2028 and the like inside a string.
    return [
        _row(where := f"{path}:{number}", _loads(where, line))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _loads(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON ({error}); write one object per line, or one list"
        ) from error


def _row(where: str, data: Any) -> Row:
    if not isinstance(data, dict):
        raise DataError(f"{where}: {data!r:.80}: a row must be an object")
    return Row(where=where, data=data)
