"""Labelled responses as Parquet: the objects of labels.jsonl, with lists of structs for mappings.

Hugging Face's `datasets` reads every column; files of earlier versions, with Arrow maps, are read
too.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fgaif.data.rows import read_rows
from fgaif.errors import DataError
from fgaif.feedback.store import decode_labeled, encode_labeled, label_store
from fgaif.types import Json, LabeledResponse

_TEXT, _INT = pa.string(), pa.int64()
_ANSWER = {"answer": _TEXT, "p_yes": pa.float64(), "problem": _TEXT, "votes": pa.list_(_TEXT)}
_FACT = {"kind": _TEXT, "text": _TEXT, "segment": _INT, "requires": pa.list_(_TEXT)}
_PROMPT = {"id": _TEXT, "image": pa.struct({"path": _TEXT, "sha256": _TEXT}), "text": _TEXT}
_RESPONSE = {
    "prompt": pa.struct(_PROMPT),
    "sample": _INT,
    "text": _TEXT,
    "token_ids": pa.list_(_INT),
    "rollout_logprobs": pa.list_(pa.float32()),
    "finish": _TEXT,
    "policy_version": _INT,
}
_SPAN = dict.fromkeys(("index", "char_start", "char_end", "token_start", "token_end"), _INT)
LABELS = pa.schema(
    {
        "response": pa.struct(_RESPONSE),
        "kinds": pa.list_(_TEXT),
        "segments": pa.list_(pa.struct(_SPAN)),
        "facts": pa.list_(pa.struct(_FACT)),
        "verdicts": pa.list_(pa.struct({"fact": _TEXT} | _ANSWER)),
        "labels": pa.list_(pa.list_(_INT)),
        "provenance": pa.list_(pa.struct({"key": _TEXT, "value": _TEXT})),
    }
)
"""Columns of a file of labelled responses."""

_BATCH = 1024


def write_labels(labeled: Iterable[LabeledResponse], path: Path) -> int:
    """Write a .parquet file, replacing an older one as a whole; return the number of rows."""
    return write_parquet(path, map(_encode, labeled), LABELS)


def read_labels(path: Path) -> Iterator[LabeledResponse]:
    """Read a .parquet file that :func:`write_labels` wrote, or a labels.jsonl, as a stream.

    Raises:
        DataError: no such file, or a malformed row (names ``FILE:ROW``).
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a labels.jsonl or .parquet file")
    if path.suffix != ".parquet":
        yield from label_store(path)
        return
    for number, row in read_rows(path, tuple(LABELS.names)):
        try:
            yield decode_labeled(_decode(row))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}:{number}: malformed ({error!r}); write it again") from error


def write_parquet(path: Path, rows: Iterable[Json], schema: pa.Schema) -> int:
    """Write rows in batches beside ``path`` and rename; return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    remaining, count = iter(rows), 0
    with pq.ParquetWriter(aside, schema) as writer:
        while batch := list(islice(remaining, _BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    aside.replace(path)
    return count


def _encode(item: LabeledResponse) -> Json:
    row = encode_labeled(item)
    verdicts = [{"fact": fact, **answer} for fact, answer in row["verdicts"].items()]
    provenance = [{"key": key, "value": value} for key, value in row["provenance"].items()]
    return row | {"verdicts": verdicts, "provenance": provenance}


def _decode(row: Json) -> Json:
    """A row as labels.jsonl has it; earlier files hold the two mappings as such."""
    found = dict(row)
    if isinstance(verdicts := row.get("verdicts"), list):
        answers = [dict(one) for one in verdicts]
        found["verdicts"] = {answer.pop("fact"): answer for answer in answers}
    if isinstance(provenance := row.get("provenance"), list):
        found["provenance"] = {one["key"]: one["value"] for one in provenance}
    return found
