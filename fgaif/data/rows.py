"""Numbered rows of JSONL and Parquet files, read as a stream; errors name file and row."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fgaif.errors import DataError
from fgaif.types import Json

ParseLine = Callable[[str], Any]
"""From one line to a value; ValueError or RecursionError mean a malformed line."""


def read_rows(
    path: Path, columns: tuple[str, ...], parse: ParseLine = json.loads
) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) of a .jsonl or .parquet file; blank lines are passed over.

    Args:
        columns: read of a Parquet file, where they exist; a JSONL row is given whole.
        parse: reads one line of a JSONL file.

    Raises:
        DataError: no such file, another kind of file, a line that cannot be parsed, or half a file.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: unknown kind of file; give a .jsonl or .parquet file")
    try:
        if path.suffix == ".jsonl":
            yield from read_lines(path, parse)
        else:
            yield from read_parquet(path, columns)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give an existing file") from error


def read_lines(path: Path, parse: ParseLine = json.loads) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of the lines that are not blank.

    Raises:
        DataError: a line cannot be parsed or is not UTF-8.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}:{number}: not valid JSON ({error}); write one object per line"
                ) from error


def read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of a Parquet file, those of ``columns`` that it has, batch by batch.

    Raises:
        DataError: not a whole Parquet file.
    """
    import pyarrow as pa  # 30 MiB that only Parquet needs
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            names = [name for name in file.schema_arrow.names if name in columns]
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield number, row
    except (pa.ArrowException, ValueError, KeyError, TypeError, OverflowError) as error:
        # The second also from names that are no text, which pyarrow leaves to Python.
        raise DataError(f"{path}: not a whole Parquet file ({error}); write it again") from error


def text_of(where: str, row: Json, column: str) -> str:
    """Return a column that must hold a text which is not blank.

    Raises:
        DataError: it is missing or holds something else, or half a character.
    """
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        return whole_text(where, column, value)
    if value is None and column not in row:
        raise DataError(f"{where}: no column `{column}`, only {', '.join(row)}; rename or add it")
    raise DataError(f"{where}: column `{column}`: {value!r:.80}: expected a text that is not empty")


def whole_text(where: str, column: str, text: str) -> str:
    """Return a text without half characters (lone surrogates), which no tokenizer reads.

    Raises:
        DataError: it holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: column `{column}`: half a character ({text[error.start]!r}) at place "
            f"{error.start}; take it out"
        ) from error
    return text


def row_id(where: str, row: Json, default: str) -> str:
    """Return the column `id`, a text or a whole number (1.0 is 1), or the default where there is
    none.

    Raises:
        DataError: it holds something else.
    """
    value = row.get("id")
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) else text_of(where, row, "id")
