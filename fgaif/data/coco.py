"""COCO annotation files: what is in each image (instances) and what people say of it (captions).

Files are ``instances_SPLIT.json`` and ``captions_SPLIT.json`` of MSCOCO 2014 and 2017, and other
files of that form. The outlines of objects, nine tenths of an instances file, are dropped while it
is read, so that memory is that of reading its text (1 GB for 0.5 GB with 600,000 objects).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fgaif.errors import DataError

T = TypeVar("T")

_READ = {
    "images", "annotations", "categories", "id", "file_name", "image_id", "category_id", "caption",
    "name",
}  # fmt: skip
_PREFIXES = ("captions_", "instances_")  # by size: the images are listed in both


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoImage:
    """An image; ``objects`` are category names in annotation order, one for each instance."""

    id: int
    file_name: str
    objects: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoFolder:
    """An annotation file and the folder that its images' file names start from."""

    annotations: Path
    image_root: Path


def read_coco(*files: Path) -> dict[int, CocoImage]:
    """Read annotation files into one record per image, by id in increasing order.

    Several files are joined: instances with captions, train with val.

    Raises:
        DataError: not JSON, a key is missing or of the wrong type (names file and key), an
            annotation of an image or category that is not listed, or two files disagree.
    """
    names: dict[int, str] = {}
    objects: dict[int, list[str]] = {}
    captions: dict[int, list[str]] = {}
    for file in files:
        tree = _load(file)
        for where, row in _entries(file, tree, "images"):
            image, name = _get(where, row, "id", int), _get(where, row, "file_name", str)
            if names.setdefault(image, name) != name:
                raise DataError(
                    f"{where}.file_name = {name!r}, but image {image} is {names[image]!r} before; "
                    "join only files of the same images"
                )
        categories = dict(_categories(file, tree))
        for where, row in _entries(file, tree, "annotations", needed=False):
            image = _get(where, row, "image_id", int)
            if image not in names:
                raise DataError(f"{where}.image_id = {image}: not in `images`; complete the file")
            if "caption" in row:
                captions.setdefault(image, []).append(_get(where, row, "caption", str).strip())
            else:
                category = _get(where, row, "category_id", int)
                if category not in categories:
                    raise DataError(f"{where}.category_id = {category}: not in `categories`")
                objects.setdefault(image, []).append(categories[category])
    return {
        image: CocoImage(
            id=image,
            file_name=names[image],
            objects=tuple(objects.get(image, ())),
            captions=tuple(captions.get(image, ())),
        )
        for image in sorted(names)
    }


def find_coco(path: Path, image_root: Path | None = None) -> CocoFolder:
    """Find annotations and images of a COCO folder, or of one of its annotation files.

    A folder must have one split in ``annotations/``. Images are looked for in ``image_root`` or
    the dataset's folder, and there in ``SPLIT`` or ``images/SPLIT`` (``images``) if that exists.

    Raises:
        DataError: no such file, no annotations, or several splits (they are listed).
    """
    if not path.exists():
        raise DataError(f"coco:{path}: no such file or folder; give a COCO folder or JSON file")
    file = _only_split(path) if path.is_dir() else path
    base = file.parent.parent if file.parent.name == "annotations" else file.parent
    base = image_root or base
    split = file.stem.partition("_")[2] or file.stem
    places = (base / split, base / "images" / split, base / "images")
    root = next((place for place in places if place.is_dir()), base)
    return CocoFolder(annotations=file, image_root=root)


def _only_split(folder: Path) -> Path:
    found = {
        file.name.removeprefix(prefix): file
        for prefix in reversed(_PREFIXES)
        for file in sorted((folder / "annotations").glob(f"{prefix}*.json"))
    }
    if not found:
        raise DataError(
            f"coco:{folder}: no annotations/captions_*.json or instances_*.json there; give a COCO "
            "folder or one annotation file"
        )
    if len(found) > 1:
        choices = ", ".join(f"coco:{file}" for _, file in sorted(found.items()))
        raise DataError(f"coco:{folder}: {len(found)} splits; choose one of {choices}")
    return next(iter(found.values()))


def _load(file: Path) -> Any:
    def slim(row: dict[str, Any]) -> dict[str, Any]:
        return {key: row[key] for key in row.keys() & _READ}

    try:
        with file.open(encoding="utf-8-sig") as opened:
            return json.load(opened, object_hook=slim)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give an existing COCO file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); give a COCO annotation file") from error


def _entries(
    file: Path, tree: Any, key: str, *, needed: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of the list ``tree[key]``."""
    rows = tree.get(key) if isinstance(tree, dict) else None
    if rows is None and isinstance(tree, dict) and not needed:
        return
    if not isinstance(rows, list):
        raise DataError(f"{file}: no list `{key}` at the top; give a COCO annotation file")
    for index, row in enumerate(rows):
        where = f"{file}: {key}[{index}]"
        if not isinstance(row, dict):
            raise DataError(f"{where} = {row!r:.60}: expected an object")
        yield where, row


def _categories(file: Path, tree: Any) -> Iterator[tuple[int, str]]:
    for where, row in _entries(file, tree, "categories", needed=False):
        yield _get(where, row, "id", int), _get(where, row, "name", str)


def _get(where: str, row: dict[str, Any], key: str, kind: type[T]) -> T:
    value = row.get(key)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # as tables of numbers are saved
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"{value!r:.60}" if key in row else "missing"
        raise DataError(f"{where}.{key}: {found}; expected {kind.__name__}")
    return value
