"""Every request and its reply, in one append-only SQLite file that survives a kill.

A reply is in the file before anything is made of it, so a job that is killed pays for nothing
twice: at most the requests on their way are asked again. Failures are rows too; they never count
as a reply. Looking up does not read the file into memory, however large it is.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from fgaif.chat.messages import ChatRequest, Reply
from fgaif.errors import DataError
from fgaif.types import Json

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    model TEXT NOT NULL,
    prompt_version TEXT NOT NULL,
    image TEXT,
    subject TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    request TEXT NOT NULL,
    reply TEXT,
    failure TEXT,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    CHECK ((reply IS NULL) <> (failure IS NULL))
);
CREATE UNIQUE INDEX IF NOT EXISTS replies_by_key ON replies (key) WHERE failure IS NULL;
CREATE TRIGGER IF NOT EXISTS replies_stay BEFORE UPDATE ON replies
    BEGIN SELECT RAISE(ABORT, 'replies are never changed'); END;
CREATE TRIGGER IF NOT EXISTS replies_remain BEFORE DELETE ON replies
    BEGIN SELECT RAISE(ABORT, 'replies are never deleted'); END;
"""
_COLUMNS = "model, prompt_version, image, subject, attempt, request, reply, failure, at"


class ReplyStore:
    """Replies by key (:meth:`ChatRequest.key`). Several processes may use one file.

    Every row is written through to the operating system at once, so a killed process loses none;
    SQLite's write-ahead log keeps the file whole if the machine itself goes down.

    Raises:
        DataError: the file is no such store, cannot be opened, or the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Rows commit one by one; calls come from one event loop, if not from one thread.
            self._file = sqlite3.connect(
                path, isolation_level=None, timeout=60.0, check_same_thread=False
            )
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.executescript(_SCHEMA)

    def get(self, key: str) -> Reply | None:
        """The stored reply of a request; None if there is none, or only failures."""
        query = "SELECT reply FROM replies WHERE key = ? AND failure IS NULL"
        with self._errors():
            row = self._file.execute(query, (key,)).fetchone()
        return _decode_reply(json.loads(row[0])) if row else None

    def add(
        self, model: str, request: ChatRequest, outcome: Reply | str, key: str | None = None
    ) -> None:
        """Append a reply, or the reason why there is none; ``key`` saves making it again."""
        reply = outcome if isinstance(outcome, Reply) else None
        row = (
            *(key or request.key(model), model, request.prompt_version),
            request.image.sha256 if request.image else None,
            *(_writable(request.subject), request.attempt),
            json.dumps(_encode_request(request)),
            json.dumps(asdict(reply)) if reply else None,
            _writable(outcome) if isinstance(outcome, str) else None,
            *((reply.input_tokens, reply.output_tokens) if reply else (0, 0)),
        )
        with self._errors():
            # Another process may have asked the same: the first reply stays.
            self._file.execute(
                "INSERT OR IGNORE INTO replies (key, model, prompt_version, image, subject, "
                "attempt, request, reply, failure, input_tokens, output_tokens) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )

    def __iter__(self) -> Iterator[Json]:
        """Every row in order, as a JSON object, for people and other programs."""
        with self._errors():
            for row in self._file.execute(f"SELECT {_COLUMNS} FROM replies ORDER BY id"):
                named = dict(zip(_COLUMNS.split(", "), row, strict=True))
                yield named | {
                    name: json.loads(named[name]) for name in ("request", "reply") if named[name]
                }

    def tokens(self, model: str) -> tuple[int, int]:
        """Input and output tokens of all replies of a model so far."""
        query = "SELECT SUM(input_tokens), SUM(output_tokens) FROM replies WHERE model = ?"
        with self._errors():
            row = self._file.execute(query, (model,)).fetchone()
        return int(row[0] or 0), int(row[1] or 0)

    def __len__(self) -> int:
        """Replies without the failures."""
        return self._count("failure IS NULL")

    @property
    def failures(self) -> int:
        """Requests that failed after all their retries."""
        return self._count("failure IS NOT NULL")

    def _count(self, where: str) -> int:
        with self._errors():
            return int(
                self._file.execute(f"SELECT COUNT(*) FROM replies WHERE {where}").fetchone()[0]
            )

    def close(self) -> None:
        """Close the file, with everything in it and nothing left in SQLite's log beside it."""
        with suppress(sqlite3.Error):  # what stays in the log is as safe there
            self._file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"{self._path}: {error}; free some space or repair the file and run again: the "
                "replies written before are kept"
            ) from error


def _writable(text: str) -> str:
    """Text that SQLite takes: half characters (lone surrogates) as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _encode_request(request: ChatRequest) -> Json:
    names: list[str] = ["system", "text", "schema", "max_tokens", "temperature", "yes_no"]
    return {name: getattr(request, name) for name in names if getattr(request, name) is not None}


def _decode_reply(row: Json) -> Reply:
    first: list[Any] = row.pop("first_token")
    return Reply(first_token=tuple((token, logprob) for token, logprob in first), **row)
