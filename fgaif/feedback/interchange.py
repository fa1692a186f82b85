"""Labelled responses in the forms of the reference implementation and of TRL.

The reference's row is ``{"image", "sub": [piece, ...], "labels": [[object, attribute, relation],
...]}`` with the codes -1 (no fact of the kind), 0 (no hallucination), 1 (hallucination), here for
any kinds, in order; its prompt is always the method's. TRL's stepwise supervision is ``{"prompt",
"completions": [piece, ...], "labels": [bool, ...]}``, here with ``"image"``; True means no
hallucination. It holds one kind and cannot tell a segment without facts: NONE is written as True,
and True is read as OK.

UNKNOWN has no place in either: rows with such a segment are left out and counted.
"""

import ast
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from fgaif.data.images import MAX_PIXELS
from fgaif.data.rows import read_lines, read_rows, text_of
from fgaif.data.scenes.questions import DESCRIBE
from fgaif.errors import DataError
from fgaif.feedback.external import ResponseMaker
from fgaif.feedback.label_rows import (
    Exported,
    Imported,
    export_rows,
    image_of,
    import_rows,
    labeled_row,
    list_of,
    pieces_of,
)
from fgaif.types import DEFAULT_KINDS, UNKNOWN, Json, Kind, LabeledResponse, SegmentClass

T = TypeVar("T")

MAX_LITERAL = 2**20
"""Characters of a line that is read as a Python literal; longer ones are refused."""

_STEPWISE = pa.schema(
    {
        "image": pa.string(),
        "prompt": pa.string(),
        "completions": pa.list_(pa.string()),
        "labels": pa.list_(pa.bool_()),
    }
)


def export_reference(
    labeled: Iterable[LabeledResponse], path: Path, image_root: Path | None = None
) -> Exported:
    """Write the reference's rows to a .jsonl file, or to a .json file as one list.

    A prompt other than the method's goes into a column ``prompt``.

    Args:
        image_root: folder that image paths are written relative to; default: absolute paths.

    Raises:
        DataError: an image outside ``image_root``, or another kind of file.
    """

    def convert(item: LabeledResponse) -> Json | None:
        if (item.labels == UNKNOWN).any():
            return None
        prompt = item.response.prompt.text
        extra = {} if prompt == DESCRIBE else {"prompt": prompt}
        labels = (item.labels - SegmentClass.OK).tolist()
        return {
            "image": image_of(item, image_root),
            **extra,
            "sub": pieces_of(item),
            "labels": labels,
        }

    return export_rows(labeled, path, convert)


def import_reference(
    path: Path,
    tokenizer: Any,
    *,
    kinds: tuple[Kind, ...] = DEFAULT_KINDS,
    root: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Imported:
    """Read the reference's rows: a .json file with one list, or lines, JSON or Python literals.

    The pieces become the segments; where two meet without white space, a space is put between
    them. Literals are parsed, never evaluated. A row that cannot be used, for instance because the
    tokenizer cannot write its text, is skipped and returned as such.

    Args:
        tokenizer: the policy's, a ``PreTrainedTokenizerFast``.
        kinds: of the codes, which have no names in the file; the reference's by default.
        root: folder that image paths start from and must lie in; default: the file's folder.
        max_pixels: larger images count as broken.

    Raises:
        DataError: the file cannot be read (names ``FILE:ROW``), or no row can be used.
    """
    maker = ResponseMaker(root or path.parent, tokenizer, max_pixels)

    def convert(where: str, number: int, row: Json) -> LabeledResponse | None:
        labels = list_of(where, row, "labels", list)
        codes = [_codes(where, index, codes, kinds) for index, codes in enumerate(labels)]
        prompt = text_of(where, row, "prompt") if "prompt" in row else DESCRIBE
        pieces = list_of(where, row, "sub", str)
        name = f"{path.stem}-{number}"
        return labeled_row(maker, where, name, {**row, "prompt": prompt}, pieces, codes, kinds)

    return import_rows(path, _reference_rows(path), convert, maker)


def export_stepwise(
    labeled: Iterable[LabeledResponse],
    path: Path,
    kind: Kind,
    image_root: Path | None = None,
) -> Exported:
    """Write TRL's rows for one kind, or for "any" (False: a hallucination of some kind).

    The file is .jsonl, .json (one list) or .parquet; see :func:`export_reference`.
    """

    def convert(item: LabeledResponse) -> Json | None:
        labels = item.labels if kind == "any" else item.of_kind(kind)[:, None]
        wrong = (labels == SegmentClass.HALLU).any(axis=1)
        if ((labels == UNKNOWN).any(axis=1) & ~wrong).any():
            return None
        return {
            "image": image_of(item, image_root),
            "prompt": item.response.prompt.text,
            "completions": pieces_of(item),
            "labels": (~wrong).tolist(),
        }

    return export_rows(labeled, path, convert, _STEPWISE)


def import_stepwise(
    path: Path,
    kind: Kind,
    tokenizer: Any,
    *,
    kinds: tuple[Kind, ...] = DEFAULT_KINDS,
    root: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Imported:
    """Read TRL's rows of one kind (.jsonl or .parquet); the other kinds are UNKNOWN.

    Files of several kinds are joined by :func:`join_labels`. Arguments and errors as for
    :func:`import_reference`.
    """
    maker = ResponseMaker(root or path.parent, tokenizer, max_pixels)
    column = kinds.index(kind)

    def convert(where: str, number: int, row: Json) -> LabeledResponse | None:
        good = list_of(where, row, "labels", bool)
        labels = np.full((len(good), len(kinds)), UNKNOWN)
        labels[:, column] = np.where(good, SegmentClass.OK, SegmentClass.HALLU)
        pieces = list_of(where, row, "completions", str)
        name = f"{path.stem}-{number}"
        return labeled_row(maker, where, name, row, pieces, labels.tolist(), kinds)

    return import_rows(path, read_rows(path, tuple(_STEPWISE.names)), convert, maker)


def join_labels(sets: Iterable[Sequence[LabeledResponse]]) -> list[LabeledResponse]:
    """Join labels of equal responses (image, prompt, text, segments): the first known one stays.

    The n-th of several equal responses of a set joins the n-th of the others.
    """
    joined: dict[tuple[Any, ...], LabeledResponse] = {}
    for labeled in sets:
        seen: Counter[tuple[Any, ...]] = Counter()
        for item in labeled:
            prompt = item.response.prompt
            same = (prompt.image.sha256, prompt.text, *pieces_of(item))
            key = (*same, seen[same])
            seen[same] += 1
            first = joined.setdefault(key, item)
            labels = np.where(first.labels == UNKNOWN, item.labels, first.labels)
            joined[key] = replace(first, labels=labels)
    return list(joined.values())


def parse_literal(line: str) -> Any:
    """Read a line of JSON or, if it is none, a Python literal of at most MAX_LITERAL characters.

    Raises ValueError; nothing is evaluated.
    """
    try:
        return json.loads(line)
    except ValueError:
        if len(line) > MAX_LITERAL:
            raise ValueError(f"{len(line)} characters, more than {MAX_LITERAL}") from None
    try:
        return ast.literal_eval(line.strip())
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"no Python literal either: {error}") from error


def _reference_rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: unknown kind of file; give a .json or .jsonl file")
    try:
        with path.open(encoding="utf-8-sig") as file:
            is_list = path.suffix == ".json" and file.read(1024).lstrip().startswith("[")
        if not is_list:
            yield from read_lines(path, parse_literal)
            return
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give an existing file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); write one list of rows") from error
    yield from enumerate(rows, start=1)


def _codes(where: str, index: int, codes: list[Any], kinds: Sequence[Kind]) -> list[int]:
    # Arrays of numbers are often saved as 0.0 and -1.0; a truth value is no code.
    numbers = all(type(code) in (int, float) for code in codes)
    if len(codes) != len(kinds) or not numbers or not {-1, 0, 1}.issuperset(codes):
        raise DataError(
            f"{where}: labels[{index}] = {codes!r:.60}: expected {len(kinds)} codes of -1, 0 or 1,"
            f" for {', '.join(kinds)}"
        )
    return [int(code) + SegmentClass.OK for code in codes]
