"""Append-only JSONL that survives a kill: responses and labels."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar, get_args

import numpy as np

from fgaif.errors import DataError
from fgaif.kinds import check_kinds
from fgaif.types import (
    DEFAULT_KINDS,
    UNKNOWN,
    Answer,
    Fact,
    FactQuery,
    FinishReason,
    ImageRef,
    IntArray,
    Json,
    Kind,
    LabeledResponse,
    Problem,
    Prompt,
    Response,
    Segment,
    SegmentClass,
    Verdict,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

_LABELS = (UNKNOWN, *map(int, SegmentClass))


class JsonlStore(Generic[T]):
    """A JSONL file of one kind of record, read as a stream and appended to in synced batches.

    Nothing is held in memory: each iteration reads the file. A batch is written with one system
    call and fsynced, so a killed run loses at most the batch it was writing: a last line without
    its end is dropped with a warning, and overwritten by the next ``append``. One process writes
    at a time.

    Args:
        path: the file; created with its folder by the first ``append``.
        encode: record to JSON object.
        decode: JSON object to record; KeyError, TypeError and ValueError mean a malformed line.
        fix: what to do about a malformed line.

    Raises:
        DataError: the file cannot be read; when iterated, a malformed line (names ``FILE:LINE``).
    """

    def __init__(
        self,
        path: Path,
        encode: Callable[[T], Json],
        decode: Callable[[Json], T],
        fix: str = "repair or delete the line",
    ) -> None:
        self.path = path
        self._encode = encode
        self._decode = decode
        self._fix = fix
        self._count = self._size = 0
        self._torn = False
        self.reopen()

    def reopen(self) -> None:
        """Look at the file anew, after it was replaced."""
        self._count = self._size = 0
        self._torn = False
        try:
            self._scan()
        except OSError as error:
            raise DataError(
                f"{self.path}: {error.strerror}; check the file and its rights"
            ) from error

    def append(self, items: Iterable[T]) -> None:
        """Write records and wait until they are on the disk.

        Raises:
            DataError: the disk is full or the file cannot be written; nothing earlier is lost.
        """
        self.append_lines([json.dumps(self._encode(item)) for item in items])

    def append_lines(self, lines: Sequence[str]) -> None:
        """Write records that were encoded elsewhere; see :meth:`append`."""
        if not lines:
            return
        content = "".join(line + "\n" for line in lines).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                if self._torn:
                    file.truncate(self._size)
                    self._torn = False
                try:
                    _write_synced(file.fileno(), content)
                except OSError:
                    file.truncate(self._size)
                    raise
        except OSError as error:
            raise DataError(
                f"{self.path}: {error.strerror}; free some space and run again: the "
                f"{self._count} records written before are kept"
            ) from error
        self._size += len(content)
        self._count += len(lines)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        """Read the records in order."""
        return self.read(0, self._count) if self._count else iter(())

    def offsets(self, every: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (position, records) of each run of ``every`` records, from record ``start`` on."""
        position = begin = 0
        taken = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(islice(file, self._count), start=1):
                position += len(line)
                if number <= start:
                    begin = position
                    continue
                taken += 1
                if taken == every:
                    yield begin, taken
                    begin, taken = position, 0
        if taken:
            yield begin, taken

    def read(self, position: int, count: int) -> Iterator[T]:
        """Read ``count`` records from a position that :meth:`offsets` gave, or from 0."""
        with self.path.open("rb") as file:
            file.seek(position)
            for index, line in enumerate(islice(file, count)):
                try:
                    yield self._decode(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    number = self._lines_before(position) + index + 1
                    raise DataError(
                        f"{self.path}:{number}: malformed ({error!r}); {self._fix}"
                    ) from error

    def _lines_before(self, position: int) -> int:
        with self.path.open("rb") as file:
            return file.read(position).count(b"\n")

    def _scan(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    self._torn = True
                    log.warning(
                        "%s:%d: dropped the last line, which a killed run left unfinished; "
                        "%d are kept",
                        *(self.path, self._count + 1, self._count),
                    )
                    return
                self._count += 1
                self._size += len(line)


LABELS_FIX = (
    "run `fgaif annotate` with this configuration: it keeps this file beside and makes what is "
    "wrong again from the stored replies"
)
"""What to do about a label file that holds something else than it should."""


def response_store(path: Path) -> JsonlStore[Response]:
    """Open the responses of a run."""
    fix = "run `fgaif sample --force`, which moves the file aside and samples anew"
    return JsonlStore(path, encode_response, decode_response, fix)


def label_store(path: Path, kinds: Sequence[Kind] | None = None) -> JsonlStore[LabeledResponse]:
    """Open the labelled responses of a run, of ``kinds`` where that is given.

    Raises:
        DataError: its labels are of other kinds.
    """
    store = JsonlStore(path, encode_labeled, decode_labeled, LABELS_FIX)
    if kinds is not None:
        for item in islice(store, 1):  # every row names them, and one job writes all
            check_kinds(f"{path}:1", item.kinds, kinds)
    return store


def encode_response(response: Response) -> Json:
    """Return a JSON object that ``decode_response`` turns back into the same response."""
    return {
        "prompt": _encode_prompt(response.prompt),
        "sample": response.sample,
        "text": response.text,
        "token_ids": response.token_ids.tolist(),
        "rollout_logprobs": response.rollout_logprobs.tolist(),
        "finish": response.finish,
        "policy_version": response.policy_version,
    }


def _encode_prompt(prompt: Prompt) -> Json:
    row = asdict(prompt)
    if not prompt.answer:  # as earlier versions wrote it
        del row["answer"]
    return row


def decode_response(row: Json) -> Response:
    """Return the response of a stored row."""
    prompt = row["prompt"]
    finish = row["finish"]
    if finish not in get_args(FinishReason):
        raise ValueError(f"finish = {finish!r}")
    return Response(
        prompt=Prompt(
            id=prompt["id"],
            image=ImageRef(**prompt["image"]),
            text=prompt["text"],
            answer=prompt.get("answer", ""),
        ),
        sample=row["sample"],
        text=row["text"],
        token_ids=np.array(row["token_ids"], dtype=np.int64),
        rollout_logprobs=np.array(row["rollout_logprobs"], dtype=np.float32),
        finish=finish,
        policy_version=row["policy_version"],
    )


def encode_labeled(item: LabeledResponse) -> Json:
    """Return a JSON object that ``decode_labeled`` turns back into the same record."""
    return {
        "response": encode_response(item.response),
        "kinds": list(item.kinds),
        "segments": [asdict(segment) for segment in item.segments],
        "facts": [asdict(fact) for fact in item.facts],
        "verdicts": {text: _encode_answer(verdict) for text, verdict in item.verdicts.items()},
        "labels": item.labels.tolist(),
        "provenance": item.provenance,
    }


def decode_labeled(row: Json) -> LabeledResponse:
    """Return the labelled response of a stored row."""
    response = decode_response(row["response"])
    image = response.prompt.image
    kinds = tuple(row.get("kinds") or DEFAULT_KINDS)  # rows of earlier versions name none
    return LabeledResponse(
        response=response,
        kinds=kinds,
        segments=tuple(Segment(**segment) for segment in row["segments"]),
        facts=tuple(Fact(**{**fact, "requires": tuple(fact["requires"])}) for fact in row["facts"]),
        verdicts={
            text: _decode_answer(FactQuery(image=image, text=text), answer)
            for text, answer in row["verdicts"].items()
        },
        labels=_decode_labels(row["labels"], len(row["segments"]), len(kinds)),
        provenance=row["provenance"],
    )


def _decode_labels(rows: list[list[int]], segments: int, kinds: int) -> IntArray:
    """Labels (S, K): a row per segment, a class or UNKNOWN per kind."""
    if len(rows) != segments:
        raise ValueError(f"{len(rows)} rows of labels for {segments} segments")
    for index, row in enumerate(rows):
        if len(row) != kinds or any(type(x) is not int or x not in _LABELS for x in row):
            raise ValueError(f"labels[{index}] = {row!r:.60}: expected {kinds} of {_LABELS}")
    return np.array(rows, dtype=np.int64).reshape(-1, kinds)


def _encode_answer(verdict: Verdict) -> Json:
    return {
        "answer": verdict.answer,
        "p_yes": verdict.p_yes,
        "problem": verdict.problem,
        "votes": list(verdict.votes),
    }


def _decode_answer(query: FactQuery, row: Json) -> Verdict:
    votes = tuple(row.get("votes", ()))  # rows of earlier versions have neither these nor a problem
    problem = row.get("problem", "")
    for answer in (row["answer"], *votes):
        if answer not in get_args(Answer):
            raise ValueError(f"answer = {answer!r}")
    if problem not in get_args(Problem):
        raise ValueError(f"problem = {problem!r}")
    return Verdict(
        query=query, answer=row["answer"], p_yes=row["p_yes"], problem=problem, votes=votes
    )


def _write_synced(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
