"""The rows of a label file are those of the first responses, in their order; one that was edited
by hand, or lost or doubled a line, is made so again."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from fgaif.errors import DataError
from fgaif.feedback.store import LABELS_FIX, JsonlStore, decode_labeled
from fgaif.types import LabeledResponse, Response


def check_order(labels: JsonlStore[LabeledResponse], responses: JsonlStore[Response]) -> None:
    """See that each label is that of the response of its row.

    Raises:
        DataError: it is not, or cannot be read; names ``FILE:LINE``.
    """
    if wrong := misplaced(labels, responses):
        raise DataError(f"{wrong}; {LABELS_FIX}")


def misplaced(labels: JsonlStore[LabeledResponse], responses: JsonlStore[Response]) -> str:
    """Name the first row that is not the label of the response of its row; empty if all are."""
    belongs = iter(responses)
    for number, (_, labeled) in enumerate(_rows(labels), start=1):
        response, where = next(belongs, None), f"{labels.path}:{number}"
        if isinstance(labeled, str):
            return f"{where}: {labeled}"
        if response is None:
            return f"{where}: labels of {labeled.response.id} after those of all responses"
        if not _is_of(labeled, response):
            found, wanted = labeled.response.id, response.id
            what = "another text" if found == wanted else repr(found)
            return f"{where}: labels of {what} where those of {wanted!r} belong"
    return ""


def repair_order(labels: JsonlStore[LabeledResponse], responses: JsonlStore[Response]) -> str:
    """Keep the labels of as many first responses as have some; the damaged file stays beside.

    Returns what was done in a line; empty, and nothing is touched, where the rows are right.

    Raises:
        DataError: two responses have one id, or the disk is full; nothing was changed.
    """
    _require_distinct(responses)
    wrong = misplaced(labels, responses)
    if not wrong:
        return ""
    found: dict[str, int] = {}
    for position, labeled in _rows(labels):
        if not isinstance(labeled, str):
            found.setdefault(labeled.response.id, position)
    path, beside = labels.path, _free_name(labels.path)
    aside, kept = path.with_name(path.name + ".tmp"), 0
    try:
        with path.open("rb") as damaged, aside.open("wb") as right:
            for response in responses:
                position = found.get(response.id, -1)
                if position < 0:
                    break
                damaged.seek(position)
                line = damaged.readline()
                if not _is_of(decode_labeled(json.loads(line)), response):
                    break
                right.write(line)
                kept += 1
            right.flush()
            os.fsync(right.fileno())
        path.rename(beside)
        aside.rename(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be put right: {error.strerror}; free some space or correct its rights"
        ) from error
    labels.reopen()
    return (
        f"{wrong}: the file is kept as {beside.name}; {kept} rows stay, the other "
        f"{len(responses) - kept} are made again from the stored replies"
    )


def _rows(labels: JsonlStore[LabeledResponse]) -> Iterator[tuple[int, LabeledResponse | str]]:
    """Yield each row's position in the file with its record, or with what is wrong with it."""
    position = 0
    if len(labels) == 0:  # there may be no file
        return
    with labels.path.open("rb") as file:
        for line in islice(file, len(labels)):
            try:
                yield position, decode_labeled(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                yield position, f"malformed ({error!r})"
            position += len(line)


def _is_of(labeled: LabeledResponse, response: Response) -> bool:
    found = labeled.response
    return (found.id, found.text, found.prompt.image.sha256) == (
        response.id,
        response.text,
        response.prompt.image.sha256,
    )


def _require_distinct(responses: JsonlStore[Response]) -> None:
    first: dict[str, int] = {}
    for number, response in enumerate(responses, start=1):
        if first.setdefault(response.id, number) != number:
            raise DataError(
                f"{responses.path}:{number}: the response {response.id!r} stands at line "
                f"{first[response.id]} already; delete one of the two lines"
            )


def _free_name(path: Path) -> Path:
    number = 1
    while (beside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    return beside
