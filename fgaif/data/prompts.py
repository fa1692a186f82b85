"""Prompts from JSONL or Parquet rows, COCO, or the embedded world; bad images are counted."""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

from fgaif.data.coco import find_coco, read_coco
from fgaif.data.images import MAX_PIXELS, check_image
from fgaif.data.messages import as_question
from fgaif.data.rows import read_rows, row_id, text_of
from fgaif.data.scenes.files import write_split
from fgaif.data.scenes.questions import DESCRIBE
from fgaif.data.scenes.world import Split
from fgaif.errors import DataError
from fgaif.types import ImageRef, Prompt

SCENES = "scenes:"
COCO = "coco:"
_CHUNK = 512
FIRST_ROWS = 64
"""Rows that are looked at before a run starts."""

CheckImage = Callable[[str, Path | None, int], ImageRef]
"""From path, root and most pixels, as :func:`check_image`."""
_COLUMNS = ("image", "images", "prompt", "messages", "video", "videos", "id", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A row that was left out: ``row`` as ``FILE:NUMBER`` (from 1), and what is wrong with it."""

    row: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Usable prompts of a source, in order, and the rows that were skipped."""

    source: str
    prompts: tuple[Prompt, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over ids, image contents, texts and answers; where images lie does not matter."""
        rows = [
            [prompt.id, prompt.image.sha256, prompt.text, *([prompt.answer] * bool(prompt.answer))]
            for prompt in self.prompts
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def warning(self, examples: int = 3) -> str:
        """Say how many rows were skipped and why, with the first examples; empty if none was."""
        return skipped_warning(self.source, len(self.prompts), self.skipped, examples)


def split_by_length(
    prompts: Sequence[Prompt], length: Callable[[Prompt], int], longest: int
) -> tuple[list[Prompt], list[Skipped]]:
    """Part those that fit from those that are too long, each in order.

    Args:
        length: tokens of a prompt as the engine reads it, with the image.
        longest: most tokens of a prompt.
    """
    fitting: list[Prompt] = []
    skipped: list[Skipped] = []
    for prompt in prompts:
        if (tokens := length(prompt)) <= longest:
            fitting.append(prompt)
        else:
            skipped.append(Skipped(row=f"prompt {prompt.id}", reason=f"{tokens} tokens"))
    return fitting, skipped


def skipped_warning(source: str, used: int, skipped: Sequence[Skipped], examples: int = 3) -> str:
    """Say how many rows of a source were skipped and why; empty if none was."""
    if not skipped:
        return ""
    lines = [f"{source}: skipped {len(skipped)} of {used + len(skipped)} rows"]
    lines += [f"  {item.row}: {item.reason}" for item in skipped[:examples]]
    more = len(skipped) - examples
    return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    where: str
    id: str
    image: str
    text: str
    answer: str = ""


def load_prompts(
    source: str,
    *,
    root: Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    cache: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    check: CheckImage = check_image,
) -> PromptSet:
    """Read prompts and check their images (in threads; each distinct path once).

    Rows hold ``image`` (a path; or ``images``, a list of one), ``prompt`` and optionally ``id`` and
    ``answer``, or a question as messages (``fgaif/data/messages.py``). A
    malformed row or a wrong column is an error; a row whose image is missing or broken is skipped
    and returned as such.

    Args:
        source: a .jsonl or .parquet file, ``scenes:SPLIT`` for the embedded world, or ``coco:PATH``
            with a COCO folder or one of its annotation files: one prompt, "Describe this image in
            detail.", for each image, by image id.
        root: folder that image paths start from and must lie in, links followed; default: the
            folder of the file, and for COCO the folder of the images.
        limit: number of prompts wanted; rows beyond are not looked at.
        seed: shuffles the rows before the limit.
        cache: where ``scenes:SPLIT`` writes its images; needed for it, as is ``limit``.
        max_pixels: larger images count as broken.
        check: looks at an image; raises DataError for one that cannot be used.

    Raises:
        DataError: unreadable file, bad row, id used twice, or no usable row.
    """
    if source.startswith(COCO):
        found = find_coco(Path(source.removeprefix(COCO)), root)
        path, root = found.annotations, found.image_root
        rows = _distinct(_coco_rows(path))
    else:
        path = _write_scenes(source, limit, cache) if source.startswith(SCENES) else Path(source)
        rows = _distinct(_parse_row(path, n, row) for n, row in read_rows(path, _COLUMNS))
    if seed is not None:
        random.Random(seed).shuffle(rows)
    look = partial(_check, check, root or path.parent, max_pixels)
    prompts: list[Prompt] = []
    skipped: list[Skipped] = []
    checked: dict[str, ImageRef | str] = {}
    wanted = len(rows) if limit is None else limit
    remaining = iter(rows)
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(remaining, min(_CHUNK, wanted - len(prompts)))):
            new = list({row.image for row in chunk} - checked.keys())
            checked.update(zip(new, pool.map(look, new), strict=True))
            for row in chunk:
                image = checked[row.image]
                if isinstance(image, ImageRef):
                    prompts.append(Prompt(id=row.id, image=image, text=row.text, answer=row.answer))
                else:
                    skipped.append(Skipped(row=row.where, reason=image))
    loaded = PromptSet(source=source, prompts=tuple(prompts), skipped=tuple(skipped))
    if not prompts:
        raise DataError(loaded.warning() or f"{path}: no rows; add some")
    return loaded


def look_at_prompts(source: str, *, root: Path | None = None, max_pixels: int = MAX_PIXELS) -> None:
    """Look at the first rows of a source, their columns and images, as :func:`load_prompts` would.

    Of COCO and the embedded world only that the files, or the split, exist.

    Raises:
        DataError: unreadable file, bad row, id used twice, no row, or no usable image among them.
    """
    if source.startswith(SCENES):
        _split(source)
    elif source.startswith(COCO):
        find_coco(Path(source.removeprefix(COCO)), root)
    else:
        path = Path(source)
        first = islice(read_rows(path, _COLUMNS), FIRST_ROWS)
        rows = _distinct(_parse_row(path, n, row) for n, row in first)
        require_image(path, [row.image for row in rows], root, max_pixels)


def count_prompts(source: str, root: Path | None, most: int) -> int:
    """Rows of a source, counted up to ``most``, with images that are not looked at.

    The embedded world has as many as one wants.

    Raises:
        DataError: unreadable file.
    """
    if source.startswith(SCENES):
        return most
    if source.startswith(COCO):
        found = find_coco(Path(source.removeprefix(COCO)), root)
        return min(most, len(read_coco(found.annotations)))
    return sum(1 for _ in islice(read_rows(Path(source), _COLUMNS), most))


def require_image(path: Path, images: Sequence[str], root: Path | None, max_pixels: int) -> None:
    """See that one of the images that a file names can be used.

    Raises:
        DataError: none can, or there are none.
    """
    if not images:
        raise DataError(f"{path}: no rows; add some")
    for image in images:
        found = _check(check_image, root or path.parent, max_pixels, image)
        if isinstance(found, ImageRef):
            return
    raise DataError(
        f"{path}: none of the first {len(images)} images can be used, the last: {found}"
    )


def _check(check: CheckImage, root: Path, max_pixels: int, image: str) -> ImageRef | str:
    try:
        return check(image, root, max_pixels)
    except DataError as error:
        return str(error)


def _write_scenes(source: str, limit: int | None, cache: Path | None) -> Path:
    split = _split(source)
    if limit is None or cache is None:
        raise ValueError(f"{source} needs a limit and a cache folder")
    return write_split(cache / f"{split}-{limit}", split, limit)


def _split(source: str) -> Split:
    split = source.removeprefix(SCENES)
    if split not in get_args(Split):
        raise DataError(f"{source}: no such split; known: {', '.join(get_args(Split))}")
    return cast(Split, split)


def _coco_rows(path: Path) -> Iterator[_Row]:
    for image in read_coco(path).values():
        where, name = f"{path}:image {image.id}", image.file_name
        yield _Row(where=where, id=Path(name).stem, image=name, text=DESCRIBE)


def _distinct(rows: Iterable[_Row]) -> list[_Row]:
    """Collect the rows and see that no id is used twice."""
    found = list(rows)
    first: dict[str, str] = {}
    for row in found:
        if first.setdefault(row.id, row.where) != row.where:
            raise DataError(
                f"{row.where}: column `id`: {row.id!r} was used at {first[row.id]}; ids must differ"
            )
    return found


def _parse_row(path: Path, number: int, row: Any) -> _Row:
    where = f"{path}:{number}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: {row!r:.80}: a row must be an object with `image` and `prompt`")
    row = as_question(where, row)
    if row.get("image") is None and isinstance(row.get("images"), list):
        row = {**row, "image": row["images"][0] if len(row["images"]) == 1 else row["images"]}
    return _Row(
        where=where,
        id=row_id(where, row, f"{path.stem}-{number}"),
        image=text_of(where, row, "image"),
        text=text_of(where, row, "prompt"),
        answer="" if row.get("answer") is None else text_of(where, row, "answer").strip(),
    )
