"""From a folder of images to prompts files: one for training, one that is held out."""

import json
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fgaif.data.images import MAX_PIXELS, check_image
from fgaif.data.prompts import Skipped
from fgaif.data.scenes.questions import DESCRIBE
from fgaif.errors import DataError
from fgaif.files import write_whole
from fgaif.types import ImageRef

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Ends of the names that are looked at, in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderPrompts:
    """What a folder gave: rows written by file, images that cannot be used, and repeats.

    ``repeats`` have the content of another one, which stays.
    """

    rows: dict[Path, int]
    skipped: tuple[Skipped, ...]
    repeats: int


def write_folder_prompts(
    folder: Path,
    output: Path,
    *,
    held_out: float = 0.1,
    texts: Sequence[str] = (DESCRIBE,),
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> FolderPrompts:
    """Write ``train.jsonl`` and ``held_out.jsonl`` into ``output``, a row for each distinct image.

    Folders within are looked at too, hidden ones and links out of the folder are not. Image paths
    are relative to ``folder``, which is to be ``data.image_root``. An image that is there twice
    counts once, so that none is both trained on and held out; which are held out depends on their
    content and ``seed``, and not on their names or order.

    Args:
        held_out: share of the images that are kept for the evaluation, in (0, 1).
        texts: prompts, given to the images in turn.

    Raises:
        DataError: no folder, no usable images, fewer than two, or a file that is there already.
    """
    files = [output / name for name in ("train.jsonl", "held_out.jsonl")]
    for file in files:
        if file.exists():
            raise DataError(f"{file}: exists; name another folder with --out, or remove it")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the one that your images lie in")
    names = _images(folder)
    look = partial(_look, folder, max_pixels)
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        looks = list(zip(names, pool.map(look, names), strict=True))
    distinct: dict[str, str] = {}
    skipped = []
    for name, found in looks:
        if isinstance(found, ImageRef):
            distinct.setdefault(found.sha256, name)
        else:
            skipped.append(Skipped(row=name, reason=found))
    if len(distinct) < 2:
        reason = f"; the first that cannot be used: {skipped[0].reason}" if skipped else ""
        raise DataError(
            f"{folder}: {len(distinct)} usable images among {len(names)} files that end in "
            f"{', '.join(sorted(SUFFIXES))}, and at least two are needed, one of them held "
            f"out{reason}"
        )
    drawn = sorted(distinct)
    random.Random(seed).shuffle(drawn)
    kept = min(max(1, round(held_out * len(drawn))), len(drawn) - 1)
    parts = dict(zip(files, (drawn[kept:], drawn[:kept]), strict=True))
    for file, hashes in parts.items():
        rows = [
            {"id": digest[:16], "image": distinct[digest], "prompt": texts[i % len(texts)]}
            for i, digest in enumerate(hashes)
        ]
        output.mkdir(parents=True, exist_ok=True)
        write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return FolderPrompts(
        rows={file: len(hashes) for file, hashes in parts.items()},
        skipped=tuple(skipped),
        repeats=len(looks) - len(skipped) - len(distinct),
    )


def _images(folder: Path) -> list[str]:
    """Names of the image files below a folder, relative to it, in order."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                found.append((Path(here) / name).relative_to(folder).as_posix())
    return found


def _look(folder: Path, max_pixels: int, name: str) -> ImageRef | str:
    try:
        return check_image(name, folder, max_pixels)
    except DataError as error:
        return str(error)
