"""Captions of images, which a reward model may read: facts that an answer can be held against."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fgaif.data.rows import read_rows, text_of
from fgaif.data.scenes.files import read_scenes
from fgaif.data.scenes.world import Scene
from fgaif.errors import DataError
from fgaif.types import ImageRef

SCENE_GRAPHS = "scenes"
"""The embedded world's captions are its scene graphs."""

MAX_CAPTIONS = 16
"""ImageCaptions of an image at most; COCO has five or six."""
_COLUMNS = ("image", "images", "caption", "captions")

Lookup = Callable[[ImageRef], Sequence[str] | None]


class ImageCaptions:
    """The captions of images, by the name of the file; of the embedded world by its scene.

    Args:
        source: ``scenes``; a COCO captions file (.json); or rows (.jsonl, .parquet) with ``image``
            and ``captions``, a list, or ``caption``.

    Raises:
        DataError: the file cannot be read, or two images of one name have other captions.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._scenes: dict[Path, dict[str, Scene]] = {}
        self._found: dict[str, tuple[str, ...]] = {}
        if source == SCENE_GRAPHS:
            return
        path = Path(source).expanduser()
        for name, captions in _coco(path) if path.suffix == ".json" else _rows(path):
            if self._found.setdefault(name, captions) != captions:
                raise DataError(f"{path}: {name} is there twice, with other captions; keep one row")
        if not self._found:
            raise DataError(f"{path}: no captions; add some")

    def of(self, image: ImageRef) -> tuple[str, ...] | None:
        """The captions of an image, None where there are none."""
        if self.source != SCENE_GRAPHS:
            return self._found.get(Path(image.path).name)
        file = Path(image.path).parents[1] / "scenes.jsonl"
        if file not in self._scenes:
            self._scenes[file] = read_scenes(file) if file.is_file() else {}
        scene = self._scenes[file].get(Path(image.path).stem)
        return None if scene is None else scene_captions(scene)

    def require(self, images: Iterable[ImageRef]) -> None:
        """See that every image has captions.

        Raises:
            DataError: some have none; says how many, and the first.
        """
        distinct = {image.sha256: image for image in images}
        missing = [image for image in distinct.values() if not self.of(image)]
        if missing:
            raise DataError(
                f"reward.captions = {self.source}: no captions of {len(missing)} of "
                f"{len(distinct)} images, the first {missing[0].path}; add them, leave these "
                "images out, or train without (reward.captions=null)"
            )


def scene_captions(scene: Scene) -> tuple[str, ...]:
    """What a scene graph says, in the embedded world's English: a sentence for each thing."""
    return tuple(f"There is a {thing.size} {thing.colour} {thing.noun}." for thing in scene.things)


def _rows(path: Path) -> Iterable[tuple[str, tuple[str, ...]]]:
    for number, row in read_rows(path, _COLUMNS):
        where = f"{path}:{number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: {row!r:.60}: a row must be an object")
        given = row.get("captions", row.get("caption"))
        listed = given if isinstance(given, list) else [given]
        texts = [text for text in listed if isinstance(text, str) and text.strip()]
        if not texts or len(texts) < len(listed):
            raise DataError(f"{where}: captions {given!r:.60}: expected texts that are not empty")
        yield Path(text_of(where, row, "image")).name, tuple(texts[:MAX_CAPTIONS])


def _coco(path: Path) -> Iterable[tuple[str, tuple[str, ...]]]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: Path(image["file_name"]).name for image in tree["images"]}
        found: dict[str, list[str]] = {}
        for item in tree["annotations"]:
            found.setdefault(names[item["image_id"]], []).append(str(item["caption"]).strip())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give an existing file") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: not COCO's captions ({type(error).__name__}: {error}); expected `images` "
            "with id and file_name, `annotations` with image_id and caption"
        ) from error
    for name, captions in found.items():
        yield name, tuple(captions[:MAX_CAPTIONS])
