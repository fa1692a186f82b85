"""Append-only JSONL that survives a kill: responses, verdicts, labels."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar, get_args

import numpy as np

from fgaif.errors import DataError
from fgaif.types import (
    KINDS,
    Answer,
    Fact,
    FactQuery,
    FinishReason,
    ImageRef,
    Json,
    LabeledResponse,
    Prompt,
    Response,
    Segment,
    Verdict,
)

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVerdict:
    """A verdict and who gave it to which prompt."""

    verifier: str
    prompt_version: str
    verdict: Verdict

    @property
    def key(self) -> tuple[str, str, str, str]:
        """(prompt version, verifier, image content, fact): what a verdict depends on."""
        query = self.verdict.query
        return (self.prompt_version, self.verifier, query.image.sha256, query.text)


class JsonlStore(Generic[T]):
    """A JSONL file of one kind of record, read at the start and appended to in synced batches.

    ``items`` holds the records in order. A batch is written with one system call and fsynced, so a
    killed run loses at most the batch it was writing: a last line without its end is dropped with a
    warning, and overwritten by the next ``append``. One process writes at a time.

    Args:
        path: the file; created with its folder by the first ``append``.
        encode: record to JSON object.
        decode: JSON object to record; KeyError, TypeError and ValueError mean a malformed line.

    Raises:
        DataError: a malformed line (names ``FILE:LINE``), or the file cannot be read.
    """

    def __init__(
        self, path: Path, encode: Callable[[T], Json], decode: Callable[[Json], T]
    ) -> None:
        self.path = path
        self._encode = encode
        self.items: list[T] = []
        self._size = 0
        self._torn = False
        try:
            self._load(decode)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; check the file and its rights") from error

    def append(self, items: Iterable[T]) -> None:
        """Write records and wait until they are on the disk.

        Raises:
            DataError: the disk is full or the file cannot be written; nothing earlier is lost.
        """
        batch = list(items)
        if not batch:
            return
        content = "".join(json.dumps(self._encode(item)) + "\n" for item in batch).encode()
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
                f"{len(self.items)} records written before are kept"
            ) from error
        self._size += len(content)
        self.items += batch

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def _load(self, decode: Callable[[Json], T]) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                self._torn = True
                log.warning(
                    "%s:%d: dropped the last line, which a killed run left unfinished; %d are kept",
                    *(self.path, number, len(self.items)),
                )
                return
            try:
                self.items.append(decode(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{self.path}:{number}: malformed ({error!r}); repair or delete the line"
                ) from error
            self._size += len(line)


class VerdictStore:
    """Verdicts of all verifiers and prompts so far; each distinct question is asked once."""

    def __init__(self, path: Path) -> None:
        self._file = JsonlStore(path, encode_verdict, decode_verdict)
        self._by_key = {item.key: item.verdict for item in self._file}

    def get(
        self, prompt_version: str, verifier: str, image_sha256: str, fact: str
    ) -> Verdict | None:
        """Return the verdict if this prompt and verifier gave it before."""
        return self._by_key.get((prompt_version, verifier, image_sha256, fact))

    def append(self, prompt_version: str, verifier: str, verdicts: Iterable[Verdict]) -> None:
        """Store verdicts; see :meth:`JsonlStore.append`."""
        items = [
            StoredVerdict(verifier=verifier, prompt_version=prompt_version, verdict=verdict)
            for verdict in verdicts
        ]
        self._file.append(items)
        self._by_key.update((item.key, item.verdict) for item in items)

    def __len__(self) -> int:
        return len(self._by_key)


def response_store(path: Path) -> JsonlStore[Response]:
    """Open the responses of a run."""
    return JsonlStore(path, encode_response, decode_response)


def label_store(path: Path) -> JsonlStore[LabeledResponse]:
    """Open the labelled responses of a run."""
    return JsonlStore(path, encode_labeled, decode_labeled)


def encode_response(response: Response) -> Json:
    """Return a JSON object that ``decode_response`` turns back into the same response."""
    return {
        "prompt": asdict(response.prompt),
        "sample": response.sample,
        "text": response.text,
        "token_ids": response.token_ids.tolist(),
        "rollout_logprobs": response.rollout_logprobs.tolist(),
        "finish": response.finish,
        "policy_version": response.policy_version,
    }


def decode_response(row: Json) -> Response:
    """Return the response of a stored row."""
    prompt = row["prompt"]
    finish = row["finish"]
    if finish not in get_args(FinishReason):
        raise ValueError(f"finish = {finish!r}")
    return Response(
        prompt=Prompt(id=prompt["id"], image=ImageRef(**prompt["image"]), text=prompt["text"]),
        sample=row["sample"],
        text=row["text"],
        token_ids=np.array(row["token_ids"], dtype=np.int64),
        rollout_logprobs=np.array(row["rollout_logprobs"], dtype=np.float32),
        finish=finish,
        policy_version=row["policy_version"],
    )


def encode_verdict(item: StoredVerdict) -> Json:
    """Return a JSON object that ``decode_verdict`` turns back into the same verdict."""
    return {
        "verifier": item.verifier,
        "prompt_version": item.prompt_version,
        "image": asdict(item.verdict.query.image),
        "fact": item.verdict.query.text,
        **_encode_answer(item.verdict),
    }


def decode_verdict(row: Json) -> StoredVerdict:
    """Return the verdict of a stored row."""
    query = FactQuery(image=ImageRef(**row["image"]), text=row["fact"])
    return StoredVerdict(
        verifier=row["verifier"],
        prompt_version=row["prompt_version"],
        verdict=_decode_answer(query, row),
    )


def encode_labeled(item: LabeledResponse) -> Json:
    """Return a JSON object that ``decode_labeled`` turns back into the same record."""
    return {
        "response": encode_response(item.response),
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
    return LabeledResponse(
        response=response,
        segments=tuple(Segment(**segment) for segment in row["segments"]),
        facts=tuple(Fact(**{**fact, "requires": tuple(fact["requires"])}) for fact in row["facts"]),
        verdicts={
            text: _decode_answer(FactQuery(image=image, text=text), answer)
            for text, answer in row["verdicts"].items()
        },
        labels=np.array(row["labels"], dtype=np.int64).reshape(-1, len(KINDS)),
        provenance=row["provenance"],
    )


def _encode_answer(verdict: Verdict) -> Json:
    return {"answer": verdict.answer, "p_yes": verdict.p_yes}


def _decode_answer(query: FactQuery, row: Json) -> Verdict:
    if row["answer"] not in get_args(Answer):
        raise ValueError(f"answer = {row['answer']!r}")
    return Verdict(query=query, answer=row["answer"], p_yes=row["p_yes"])


def _write_synced(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
