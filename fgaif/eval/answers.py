"""Answers of other tools to yes/no questions, and captions, in the formats that they write.

Answers: LLaVA's model_vqa (``question_id``, ``prompt``, ``text``) and POPE's own (``question``,
``answer``). Captions: CHAIR's original file (``imgToEval``), a list or lines of ``image_id`` and
``caption``, and model_vqa's. A file may be JSON Lines or one JSON list, whatever its ending.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fgaif.errors import DataError
from fgaif.eval.rows import Row, read_rows, warn_of_repeats

_IMAGE_FILE = re.compile(r"(.+)\.(?:jpe?g|png|webp|bmp|gif)", re.IGNORECASE)
_URL_QUERY = re.compile(r"(\.(?:jpe?g|png|webp|bmp|gif))[?#].*", re.IGNORECASE)
_COCO_FILE = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:\.\w+)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow:
    """An answer to one question. ``where`` is its row in a file; None stands for what the file
    does not say. ``image`` is a name as ``image_name`` gives it."""

    where: str
    text: str
    id: str | None = None
    image: str | None = None
    question: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """A caption of an image (``image_name``); ``where`` is its row, ``question`` the prompt. ``id``
    is the image, with "#2" and so on when a file has several captions of it."""

    where: str
    id: str
    image: str
    text: str
    question: str = ""


def image_name(value: str | int) -> str:
    """Name an image as all files do: COCO's number, else the file name without folders.

    "val2014/COCO_val2014_000000310196.jpg", "000000310196" and 310196 are all "310196". What a URL
    has after the file name is cut off.
    """
    name = _URL_QUERY.sub(r"\1", str(value).strip()).replace("\\", "/").rpartition("/")[2]
    if match := _COCO_FILE.fullmatch(name):
        name = match[1]
    return str(int(name)) if name.isdecimal() else name


def image_finder(known: Iterable[str]) -> Callable[[str], str]:
    """Make a function from a name (``image_name``) to the one among ``known`` that means the same.

    A name that is there stands for itself. Else the ending and leading zeros do not count, where
    that leaves one image: "101.jpg" finds "101", and "cat" finds "cat.png". Any other name comes
    back as it is.
    """
    names = set(known)
    by_stem: dict[str, set[str]] = {}
    for name in names:
        by_stem.setdefault(_stem(name), set()).add(name)

    def find(name: str) -> str:
        if name in names:
            return name
        same = by_stem.get(_stem(name), set())
        return next(iter(same)) if len(same) == 1 else name

    return find


def _stem(name: str) -> str:
    match = _IMAGE_FILE.fullmatch(name)
    stem = match[1] if match else name
    return str(int(stem)) if stem.isdecimal() else stem


def read_answers(path: Path) -> list[AnswerRow]:
    """Read answers to questions, in the order of the file.

    The answer stands under ``text`` or ``answer``, the question under ``question`` or ``prompt``,
    an id under ``question_id``, an image under ``image``; all but the answer may be missing. Of
    equal answers under one id the first counts, and how many there were is warned about.

    Raises:
        DataError: the file or a row cannot be used (names row and key), or an id comes twice.
    """
    answers: list[AnswerRow] = []
    first: dict[str, AnswerRow] = {}
    repeated = 0
    for row in read_rows(path):
        answer = _answer(row)
        if answer.id is not None:
            other = first.setdefault(answer.id, answer)
            if other is not answer and replace(answer, where=other.where) == other:
                repeated += 1
                continue
        answers.append(answer)
    check_ids((answer.where, answer.id) for answer in answers if answer.id is not None)
    warn_of_repeats(str(path), repeated)
    return answers


def _answer(row: Row) -> AnswerRow:
    data = row.data
    question = "question" if "question" in data else "prompt"
    return AnswerRow(
        where=row.where,
        text=row.text("text", "answer", empty=True),
        id=row.identity("question_id") if "question_id" in data else None,
        image=image_name(row.identity("image")) if data.get("image") is not None else None,
        question=_question(row, question),
    )


def _question(row: Row, key: str) -> str | None:
    value = row.data.get(key)
    if value is None:
        return None
    return "\n".join(row.texts(key)) if isinstance(value, list) else row.text(key)


def check_ids(ids: Iterable[tuple[str, str]]) -> None:
    """Refuse ids that come twice, given as (row, id).

    Raises:
        DataError: names both rows.
    """
    first: dict[str, str] = {}
    for where, identity in ids:
        if first.setdefault(identity, where) != where:
            raise DataError(
                f"{where}: key `question_id`: {identity!r} was used at {first[identity]}; ids must "
                "differ"
            )


def read_captions(
    path: Path,
    *,
    image_key: str | None = None,
    caption_key: str | None = None,
    images: Mapping[str, str] | None = None,
) -> list[Caption]:
    """Read captions, in the order of the file; one that says the same of the same image again
    counts once, and how many did is warned about.

    Args:
        image_key: where the image's number or file name stands; by default ``image_id`` or
            ``image``.
        caption_key: where the caption stands; by default ``caption``, ``text`` or ``answer``.
        images: the image of each question id, for files of model_vqa, which name no image.

    Raises:
        DataError: the file or a row cannot be used (names row and key), or a question id is not
            in ``images``.
    """
    image_keys = (image_key,) if image_key else ("image_id", "image")
    caption_keys = (caption_key,) if caption_key else ("caption", "text", "answer")
    captions = []
    repeats: Counter[str] = Counter()
    seen: set[tuple[str, str, str]] = set()
    repeated = 0
    for row in _original_rows(path) or read_rows(path):
        has_image = images is None or any(key in row.data for key in image_keys)
        image = image_name(row.identity(*image_keys) if has_image else _image_of(row, images or {}))
        text = row.text(*caption_keys, empty=True)
        question = row.shown("prompt")
        if (image, text, question) in seen:
            repeated += 1
            continue
        seen.add((image, text, question))
        repeats[image] += 1
        captions.append(
            Caption(
                where=row.where,
                id=image if repeats[image] == 1 else f"{image}#{repeats[image]}",
                image=image,
                text=text,
                question=question,
            )
        )
    warn_of_repeats(str(path), repeated)
    return captions


def _image_of(row: Row, images: Mapping[str, str]) -> str:
    identity = row.identity("question_id")
    if identity not in images:
        raise row.wrong("question_id", identity, "the id of a question; give the questions' file")
    return images[identity]


def _original_rows(path: Path) -> list[Row]:
    """Return the captions of CHAIR's original file, {"imgToEval": {id: {...}}}, else nothing."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text) if text.lstrip().startswith("{") and "imgToEval" in text else None
    except (OSError, ValueError, RecursionError):
        return []  # not that form; read_rows says what is wrong with the file
    entries = tree.get("imgToEval") if isinstance(tree, dict) else None
    if entries is None:
        return []
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise DataError(f"{path}: key `imgToEval`: expected an object of captions by image")
    return [
        Row(where=f"{path}: imgToEval[{image!r}]", data={"image_id": image, **entry})
        for image, entry in entries.items()
    ]
