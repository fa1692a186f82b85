"""What the forms of labelled responses share: pieces and labels in, rows out, rows left out."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from fgaif.data.prompts import Skipped, skipped_warning
from fgaif.data.rows import row_id, text_of, whole_text
from fgaif.errors import DataError
from fgaif.feedback.external import ResponseMaker, object_row
from fgaif.feedback.parquet import write_parquet
from fgaif.feedback.segment import segment_at
from fgaif.types import Json, Kind, LabeledResponse

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Rows written, and rows left out: with an UNKNOWN segment, or without any segment."""

    written: int
    unknown: int
    empty: int

    def warning(self) -> str:
        """Say how many rows were left out and why; empty if none was."""
        left = self.unknown + self.empty
        if not left:
            return ""
        return (
            f"left out {left} of {self.written + left} responses: {self.unknown} with a segment "
            f"that could not be judged, {self.empty} without any segment"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Labelled responses in order, without facts, and the rows left out, by what is wrong."""

    source: str
    labeled: tuple[LabeledResponse, ...]
    skipped: tuple[Skipped, ...] = ()

    def warning(self, examples: int = 3) -> str:
        """Say how many rows were skipped and why, with the first examples; empty if none was."""
        return skipped_warning(self.source, len(self.labeled), self.skipped, examples)


def import_rows(
    path: Path,
    rows: Iterable[tuple[int, Any]],
    convert: Callable[[str, int, Json], LabeledResponse | None],
    maker: ResponseMaker,
) -> Imported:
    """Convert the rows (where, number, row); bad ones are skipped, and collected in ``maker``.

    Raises:
        DataError: no usable row.
    """
    labeled: list[LabeledResponse] = []
    for number, row in rows:
        where = f"{path}:{number}"
        with maker.skipping(where):
            item = convert(where, number, object_row(where, row))
            labeled += [item] if item else []
    result = Imported(source=str(path), labeled=tuple(labeled), skipped=tuple(maker.skipped))
    if not labeled:
        raise DataError(result.warning() or f"{path}: no rows; add some")
    return result


def labeled_row(
    maker: ResponseMaker,
    where: str,
    name: str,
    row: Json,
    pieces: list[str],
    labels: list[Any],
    kinds: tuple[Kind, ...],
) -> LabeledResponse | None:
    """Make a response of pieces, and its labels (S, K); None if its image cannot be used.

    Where two pieces meet without white space, a space is put between them.

    Args:
        name: id of a row without a column ``id``.

    Raises:
        DataError: pieces and labels differ in number, or the text cannot be written or cut so.
    """
    if not pieces or len(pieces) != len(labels):
        raise DataError(
            f"{where}: {len(pieces)} pieces and {len(labels)} labels; give one label for each "
            "piece, and at least one"
        )
    spaced = [
        left if left[-1].isspace() or right[0].isspace() else f"{left} "
        for left, right in pairwise(pieces)
    ]
    spaced.append(pieces[-1])
    response = maker.make(
        where,
        id=row_id(where, row, name),
        image=text_of(where, row, "image"),
        prompt=text_of(where, row, "prompt"),
        text="".join(spaced),
    )
    if response is None:
        return None
    try:
        segments = segment_at(response, maker.tokenizer, list(accumulate(map(len, spaced))))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return LabeledResponse(
        response=response,
        kinds=kinds,
        segments=segments,
        facts=(),
        verdicts={},
        labels=np.array(labels, dtype=np.int64),
        provenance={"imported": where},
    )


def list_of(where: str, row: Json, column: str, kind: type[T]) -> list[T]:
    """Return a column that must be a list of ``kind``, no text in it blank.

    Raises:
        DataError: it is missing or holds something else.
    """
    values = row.get(column)
    if not isinstance(values, list):
        raise DataError(f"{where}: column `{column}`: {values!r:.60}: expected a list")
    for index, value in enumerate(values):
        if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
            raise DataError(
                f"{where}: {column}[{index}] = {value!r:.60}: expected {kind.__name__}, not blank"
            )
        if isinstance(value, str):
            whole_text(where, column, value)
    return values


def export_rows(
    labeled: Iterable[LabeledResponse],
    path: Path,
    convert: Callable[[LabeledResponse], Json | None],
    schema: pa.Schema | None = None,
) -> Exported:
    """Write what ``convert`` makes of each response, None for one that cannot be told.

    A .jsonl file holds lines, a .json file one list; .parquet needs ``schema``.

    Raises:
        DataError: another kind of file.
    """
    empty = unknown = 0

    def rows() -> Iterator[Json]:
        nonlocal empty, unknown
        for item in labeled:
            row = convert(item) if item.segments else None
            if row is not None:
                yield row
            elif item.segments:
                unknown += 1
            else:
                empty += 1

    written = _write(path, rows(), schema)
    return Exported(written=written, unknown=unknown, empty=empty)


def _write(path: Path, rows: Iterable[Json], schema: pa.Schema | None) -> int:
    if path.suffix == ".parquet" and schema is not None:
        return write_parquet(path, rows, schema)
    if path.suffix not in (".json", ".jsonl"):
        more = ", .parquet" if schema else ""
        raise DataError(f"{path}: unknown kind of file; name it .jsonl, .json{more}")
    first, between, last = ("[\n", ",\n", "\n]\n") if path.suffix == ".json" else ("", "\n", "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, count = path.with_name(path.name + ".tmp"), 0
    with aside.open("w", encoding="utf-8") as file:
        file.write(first)
        for count, row in enumerate(rows, start=1):
            file.write((between if count > 1 else "") + json.dumps(row, ensure_ascii=False))
        file.write(last)
    aside.replace(path)
    return count


def image_of(item: LabeledResponse, image_root: Path | None) -> str:
    """Return the image's path, relative to ``image_root`` where that is given.

    Raises:
        DataError: it lies outside.
    """
    path = Path(item.response.prompt.image.path)
    if image_root is None:
        return str(path)
    if not path.is_relative_to(image_root.resolve()):
        raise DataError(
            f"response {item.response.id}: image {path} lies outside {image_root}; give the folder "
            "of all images"
        )
    return path.relative_to(image_root.resolve()).as_posix()


def pieces_of(item: LabeledResponse) -> list[str]:
    """Return the texts of the segments."""
    return [item.response.text[s.char_start : s.char_end] for s in item.segments]
