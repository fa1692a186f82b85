"""AMBER's files: annotations, queries, answers, and the words that count as an object."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from fgaif.errors import DataError
from fgaif.eval.rows import Row, read_rows, warn_of_repeats

_TYPES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute/state",
    "discriminative-attribute-number": "attribute/number",
    "discriminative-attribute-action": "attribute/action",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AmberWords:
    """The benchmark's words: synonyms of each object, and words that are never hallucinated.

    ``near`` are words so close that naming one for the other is no hallucination, both ways.
    """

    synonyms: Mapping[str, Sequence[str]]
    safe: frozenset[str] = frozenset()
    near: frozenset[frozenset[str]] = frozenset()
    objects: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        known = {word for words in self.synonyms.values() for word in words}
        object.__setattr__(self, "objects", frozenset(known | set(self.synonyms)))

    def closest(self, noun: str, names: Sequence[str], *, near: bool) -> int | None:
        """Return which of an image's objects a noun stands for, by the script's order.

        That is the first of all objects' synonyms, then the objects themselves, that equals the
        noun (with ``near``: or is near to it).
        """
        for index, synonyms in enumerate(names):
            if any(self._same(noun, word, near) for word in self.synonyms.get(synonyms, ())):
                return index
        return next((i for i, name in enumerate(names) if self._same(noun, name, near)), None)

    def _same(self, noun: str, word: str, near: bool) -> bool:
        return noun == word or (near and frozenset((noun, word)) in self.near)


@dataclass(frozen=True, slots=True, kw_only=True)
class AmberRow:
    """One annotation: a description's objects and lures, or a question's part and right answer."""

    part: str | None = None
    no: bool = False
    truth: tuple[str, ...] = ()
    hallu: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AmberAnswer:
    """An answer, and the question that its row repeats, if it does."""

    text: str
    question: str = ""


def read_annotations(path: Path) -> dict[str, AmberRow]:
    """Read AMBER's annotations by id.

    Raises:
        DataError: the file cannot be used (names row and key), or an id comes twice.
    """
    found: dict[str, AmberRow] = {}
    for row in read_rows(path):
        identity = row.identity("id")
        if identity in found:
            raise DataError(f"{row.where}: key `id`: {identity} was there before; keep one")
        kind = row.text("type")
        if kind == "generative":
            found[identity] = AmberRow(
                truth=tuple(row.texts("truth")), hallu=tuple(row.texts("hallu"))
            )
            continue
        truth = row.text("truth")
        if truth not in ("yes", "no"):
            raise row.wrong("truth", truth, "yes or no")
        found[identity] = AmberRow(part=_TYPES.get(kind, "relation"), no=truth == "no")
    return found


def read_responses(paths: Iterable[Path]) -> dict[str, AmberAnswer]:
    """Read answers by id: rows of ``id`` and ``response``, or what model_vqa writes.

    Of equal answers to one id the first counts, and their number is said.

    Raises:
        DataError: a file or row cannot be used, or two answers to one id differ.
    """
    found: dict[str, AmberAnswer] = {}
    for path in paths:
        repeated = 0
        for row in read_rows(path):
            identity = row.identity("id", "question_id")
            answer = AmberAnswer(
                text=row.text("response", "text", "answer", empty=True),
                question=row.shown("query", "question", "prompt"),
            )
            first = found.setdefault(identity, answer)
            if first.text != answer.text:
                raise DataError(f"{row.where}: another answer to {identity} is there; keep one")
            repeated += first is not answer
        warn_of_repeats(str(path), repeated)
    return found


def read_queries(paths: Iterable[Path]) -> dict[str, tuple[str, str]]:
    """Read image and question by id from AMBER's query files."""
    rows = (row for path in paths for row in read_rows(path))
    return {row.identity("id"): (row.text("image"), row.text("query")) for row in rows}


def read_words(
    annotations: Mapping[str, AmberRow], relation: Path | None, safe_words: Path | None
) -> AmberWords:
    """Read the words' files; without ``relation`` the annotations' own objects have no synonyms.

    Raises:
        DataError: a file cannot be read as what it should be.
    """
    rows = annotations.values()
    synonyms: dict[str, Sequence[str]] = {w: () for r in rows for w in (*r.truth, *r.hallu)}
    if relation is not None:
        synonyms |= _read_relation(relation)
    try:
        safe = safe_words.read_text(encoding="utf-8-sig").split() if safe_words else []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{safe_words}: cannot be read ({error}); one word per line") from error
    lines = (files("fgaif.eval") / "near_words.txt").read_text(encoding="utf-8").splitlines()
    near = frozenset(frozenset(line.split(", ")) for line in lines)
    return AmberWords(synonyms=synonyms, safe=frozenset(safe), near=near)


def _read_relation(path: Path) -> dict[str, Sequence[str]]:
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give AMBER's relation.json") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected an object of lists of words; give AMBER's relation.json")
    row = Row(where=str(path), data=tree)
    return {word: row.texts(word) for word in tree}


def beside(file: Path, name: str) -> Path | None:
    """Return the file of this name in the folder of another, or None."""
    path = file.with_name(name)
    return path if path.is_file() else None


def find_queries(folder: Path) -> list[Path]:
    """AMBER's query files in a folder or in ``query/``: the one with all, else those of parts."""
    for place in (folder, folder / "query"):
        whole = place / "query_all.json"
        if found := [whole] if whole.is_file() else sorted(place.glob("query_*.json")):
            return found
    return []
