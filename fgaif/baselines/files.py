"""Preference and SFT rows on disk, in TRL's forms: images by path, everything else as text.

    {"id", "images": [PATH], "prompt": [{"role": "user", "content": TEXT}],
     "chosen": [{"role": "assistant", "content": TEXT}], "rejected": [...],
     "score_chosen": NUMBER, "score_rejected": NUMBER}

and of SFT ``completion`` and ``score``. Beside them ``pairs.json`` says of which policy they are.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fgaif.baselines.pairs import Pairing, ScoredText
from fgaif.data.images import MAX_PIXELS, check_image
from fgaif.data.prompts import Skipped, skipped_warning
from fgaif.data.rows import read_rows, text_of, whole_text
from fgaif.errors import DataError
from fgaif.files import write_whole
from fgaif.types import ImageRef, Json

CARD, PREFERENCES, SFT = "pairs.json", "preference.jsonl", "sft.jsonl"
MAX_JSON = 2 * 2**30
"""Bytes of a .json file, which is read at once; larger ones are to be written as .jsonl."""
_COLUMNS = (
    *("id", "image", "images", "prompt", "chosen", "rejected", "completion", "response", "text"),
    *("messages", "conversations"),
)
Role = Literal["system", "user", "assistant"]
Turn = tuple[Role, str]
"""Who says what."""
_ROLES: dict[str, Role] = {
    "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant",
    "system": "system",
}  # fmt: skip


class PairsCard(BaseModel):
    """Where pairs come from; the content of ``pairs.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    policy: str
    """Name of the model that sampled the responses; for people, not checked."""
    policy_digest: str
    """`checkpoint_digest` of it; `fgaif baseline` compares."""
    score: str
    """What the scores are."""
    counts: dict[str, int]
    """See :class:`fgaif.baselines.pairs.Pairing`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What a trainer learns from: a conversation about an image, and how it may go on.

    ``turns`` end with the user's; of SFT ``rejected`` is None.
    """

    image: ImageRef
    turns: tuple[Turn, ...]
    chosen: str
    rejected: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Usable examples of a file, in order, and the rows that were left out."""

    source: str
    rows: tuple[Example, ...]
    skipped: tuple[Skipped, ...] = ()

    def warning(self) -> str:
        """Say how many rows were left out and why; empty if none was."""
        return skipped_warning(self.source, len(self.rows), self.skipped, 3)


def write_pairs(folder: Path, pairing: Pairing, card: PairsCard) -> None:
    """Write ``preference.jsonl``, ``sft.jsonl`` and, last, the card; older ones are replaced."""
    preferences = (
        {
            **_head(pair.chosen),
            "chosen": _said("assistant", pair.chosen.text.strip()),
            "rejected": _said("assistant", pair.rejected.text.strip()),
            "score_chosen": pair.chosen.score,
            "score_rejected": pair.rejected.score,
        }
        for pair in pairing.pairs
    )
    best = (
        {**_head(item), "completion": _said("assistant", item.text.strip()), "score": item.score}
        for item in pairing.best
    )
    (folder / CARD).unlink(missing_ok=True)
    write_whole(folder / PREFERENCES, _lines(preferences))
    write_whole(folder / SFT, _lines(best))
    write_whole(folder / CARD, card.model_dump_json(indent=2) + "\n")


def _head(item: ScoredText) -> Json:
    prompt = item.prompt
    return {
        "id": prompt.id,
        "images": [prompt.image.path],
        "prompt": _said("user", prompt.text),
    }


def _said(role: Role, text: str) -> list[Json]:
    return [{"role": role, "content": text}]


def _lines(rows: Iterable[Json]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_card(folder: Path) -> PairsCard | None:
    """The card of a folder; None where there is none, as beside a user's own files.

    Raises:
        DataError: it is there and cannot be read.
    """
    try:
        return PairsCard.model_validate_json((folder / CARD).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{folder / CARD}: cannot be read ({error}); make the pairs again with `fgaif pairs`"
        ) from error


def check_base(file: Path, policy: str, digest: str) -> None:
    """See that pairs were sampled from this policy; a file without a card is anybody's.

    Raises:
        DataError: they are of another one.
    """
    card = read_card(file.parent)
    if card is not None and card.policy_digest != digest:
        raise DataError(
            f"{file}: pairs of another base: sampled from {card.policy}, but policy.model = "
            f"{policy!r} has other weights; make them with `fgaif pairs` from this model's "
            f"responses, set policy.model={card.policy}, or train on them all the same with "
            "--any-base"
        )


def read_preferences(
    path: Path, *, root: Path | None = None, max_pixels: int = MAX_PIXELS
) -> Examples:
    """Read preference rows of a .jsonl, .json or .parquet file; texts or conversations.

    A row that cannot be used (its image, a column) is left out and returned as such.

    Args:
        root: folder that image paths start from and must lie in; default: the file's for relative
            ones, anywhere for absolute ones.

    Raises:
        DataError: the file cannot be read (names ``FILE:ROW``), or no row can be used.
    """

    def convert(where: str, row: Json) -> list[tuple[tuple[Turn, ...], str, str | None]]:
        turns = _asked(where, row)
        chosen, rejected = (_answer(where, row, column) for column in ("chosen", "rejected"))
        if chosen == rejected:
            raise DataError(f"{where}: chosen and rejected are the same text")
        return [(turns, chosen, rejected)]

    return _read(path, convert, root, max_pixels)


def read_sft(path: Path, *, root: Path | None = None, max_pixels: int = MAX_PIXELS) -> Examples:
    """Read SFT rows: ours, TRL's, or LLaVA's conversations; see :func:`read_preferences`.

    A row has an image and ``prompt`` with ``completion`` (or ``response``), or ``messages`` (role,
    content), or ``conversations`` (from, value). Each of the assistant's turns becomes an example,
    with what was said before it.
    """

    def convert(where: str, row: Json) -> list[tuple[tuple[Turn, ...], str, str | None]]:
        for column in ("messages", "conversations"):
            if row.get(column) is not None:
                return [(*found, None) for found in _replies(where, column, row[column])]
        column = next(
            (c for c in ("completion", "response", "text") if row.get(c) is not None), "completion"
        )
        return [(_asked(where, row), _answer(where, row, column), None)]

    return _read(path, convert, root, max_pixels)


Found = list[tuple[tuple[Turn, ...], str, str | None]]


def _read(
    path: Path, convert: Callable[[str, Json], Found], root: Path | None, max_pixels: int
) -> Examples:
    rows: list[Example] = []
    skipped: list[Skipped] = []
    images: dict[str, ImageRef] = {}
    for number, row in json_rows(path, _COLUMNS):
        where = f"{path}:{number}"
        try:
            if not isinstance(row, dict):
                raise DataError(f"{where}: {row!r:.80}: a row must be an object")
            name = _image_of(where, row)
            if name not in images:
                images[name] = _check(name, path.parent, root, max_pixels)
            found = convert(where, row)
            rows += [
                Example(image=images[name], turns=turns, chosen=chosen, rejected=rejected)
                for turns, chosen, rejected in found
            ]
        except DataError as error:
            skipped.append(Skipped(row=where, reason=str(error).removeprefix(f"{where}: ")))
    found_all = Examples(source=str(path), rows=tuple(rows), skipped=tuple(skipped))
    if not rows:
        raise DataError(found_all.warning() or f"{path}: no rows; add some")
    return found_all


def json_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) of a .json list, a .jsonl or a .parquet file.

    Raises:
        DataError: the file cannot be read; see :func:`fgaif.data.rows.read_rows`.
    """
    if path.suffix != ".json":
        yield from read_rows(path, columns)
        return
    try:
        if path.stat().st_size > MAX_JSON:
            raise DataError(f"{path}: over {MAX_JSON / 2**30:.0f} GiB; write it as .jsonl")
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give an existing file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); write one list of rows") from error
    if not isinstance(loaded, list):
        raise DataError(f"{path}: expected one list of rows; or write a .jsonl, a row per line")
    yield from enumerate(loaded, start=1)


def _image_of(where: str, row: Json) -> str:
    images = row.get("images", row.get("image"))
    listed = images if isinstance(images, list) else [images]
    paths = [item.get("path") if isinstance(item, dict) else item for item in listed]
    if len(paths) != 1 or not isinstance(paths[0], str) or not paths[0]:
        raise DataError(f"{where}: image {images!r:.80}: give one image by its path")
    return paths[0]


def _check(name: str, beside: Path, root: Path | None, max_pixels: int) -> ImageRef:
    inside = root if root is not None or Path(name).is_absolute() else beside
    return check_image(name, inside, max_pixels)


def _asked(where: str, row: Json) -> tuple[Turn, ...]:
    if not isinstance(row.get("prompt"), list):
        return (("user", text_of(where, row, "prompt")),)
    turns = turns_of(where, "prompt", row["prompt"])
    if not turns or turns[-1][0] != "user":
        raise DataError(f"{where}: prompt: the last turn must be the user's")
    return turns


def _answer(where: str, row: Json, column: str) -> str:
    if not isinstance(row.get(column), list):
        return text_of(where, row, column)
    turns = turns_of(where, column, row[column])
    if len(turns) != 1 or turns[0][0] != "assistant":
        raise DataError(f"{where}: {column}: expected one turn, the assistant's")
    return turns[0][1]


def _replies(where: str, column: str, said: Any) -> list[tuple[tuple[Turn, ...], str]]:
    turns = turns_of(where, column, said)
    found = [
        (turns[:at], text)
        for at, (role, text) in enumerate(turns)
        if role == "assistant" and at and turns[at - 1][0] == "user"
    ]
    if not found:
        raise DataError(f"{where}: {column}: no turn of the assistant after one of the user")
    return found


def turns_of(where: str, column: str, said: Any) -> tuple[Turn, ...]:
    """Turns of a conversation in TRL's form (role, content) or LLaVA's (from, value).

    Raises:
        DataError: it is none, or a turn has no text.
    """
    if not isinstance(said, list):
        raise DataError(f"{where}: {column}: {said!r:.60}: expected a list of turns")
    return tuple(_turn(f"{where}: {column}[{at}]", turn) for at, turn in enumerate(said))


def _turn(where: str, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: {turn!r:.60}: expected role and content")
    named, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    role = _ROLES.get(str(named))
    if role is None:
        raise DataError(f"{where}: role {named!r:.40}: expected user, assistant or system")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: {content!r:.60}: expected a text that is not empty")
    return role, whole_text(where, "content", content)


def examples_of(pairing: Pairing) -> Sequence[Example]:
    """The pairs as examples for DPO, without a file in between."""
    return [
        Example(
            image=pair.chosen.prompt.image,
            turns=(("user", pair.chosen.prompt.text),),
            chosen=pair.chosen.text.strip(),
            rejected=pair.rejected.text.strip(),
        )
        for pair in pairing.pairs
    ]
