"""Build POPE's question files from annotated images: COCO's, or those of the embedded world."""

import json
from pathlib import Path

from fgaif.data.coco import read_coco
from fgaif.data.scenes.files import read_scenes, write_split
from fgaif.data.scenes.world import NOUNS, Split
from fgaif.eval.pope import STRATEGIES, build_rows, write_questions
from fgaif.files import write_whole
from fgaif.types import Json


def build_from_coco(instances: Path, out: Path, *, count: int, seed: int) -> dict[str, int]:
    """Write ``coco_pope_SPLIT.jsonl`` from a COCO instances file; returns questions per split.

    Raises:
        DataError: the file cannot be used, or too few of its images show three objects.
    """
    images = [(image.file_name, image.objects) for image in read_coco(instances).values()]
    return _write(images, out, count, seed)


def build_from_scenes(split: Split, out: Path, *, count: int, seed: int) -> dict[str, int]:
    """Draw scenes and write their questions, and what CHAIR needs of them.

    ``images/`` holds the pictures, ``instances.json`` what they show in COCO's form,
    ``synonyms.txt`` the world's nouns in CHAIR's: so the embedded world goes through the same code
    as COCO. All scenes with three objects or more are asked about.
    """
    folder = write_split(out, split, count).parent
    scenes = read_scenes(folder / "scenes.jsonl")
    images = [(f"images/{name}.png", tuple(scene.nouns)) for name, scene in scenes.items()]
    write_whole(out / "instances.json", json.dumps(_coco(images)) + "\n")
    write_whole(out / "synonyms.txt", "".join(f"{noun}\n" for noun in NOUNS))
    return _write(images, out, None, seed)


def _write(
    images: list[tuple[str, tuple[str, ...]]], out: Path, count: int | None, seed: int
) -> dict[str, int]:
    counts: dict[str, int] = {}
    for strategy in STRATEGIES:
        rows = build_rows(images, strategy, count=count, seed=seed)
        write_questions(out / f"coco_pope_{strategy}.jsonl", rows)
        counts[strategy] = len(rows)
    return counts


def _coco(images: list[tuple[str, tuple[str, ...]]]) -> Json:
    categories = {noun: number for number, noun in enumerate(NOUNS, start=1)}
    return {
        "images": [{"id": n, "file_name": name} for n, (name, _) in enumerate(images, start=1)],
        "categories": [{"id": number, "name": noun} for noun, number in categories.items()],
        "annotations": [
            {"image_id": n, "category_id": categories[noun]}
            for n, (_, nouns) in enumerate(images, start=1)
            for noun in nouns
        ],
    }
