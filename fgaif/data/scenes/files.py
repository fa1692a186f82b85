"""Write scenes to disk, so that they go through the same image pipeline as anybody's pictures."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fgaif.data.scenes.draw import draw_scene
from fgaif.data.scenes.questions import DESCRIBE
from fgaif.data.scenes.world import Scene, Split, Thing, scene_at

MODELS = Path(__file__).parent / "models"
"""The shipped checkpoints: ``MODELS / "policy"`` and ``MODELS / "verifier"``."""


def scene_images(split: Split, start: int, stop: int) -> Iterator[tuple[str, Scene]]:
    """Yield (id, scene) for the scenes ``start`` to ``stop - 1`` of a split, always the same."""
    for index in range(start, stop):
        yield f"{split}-{index:06d}", scene_at(split, index)


def write_split(directory: Path, split: Split, n: int, start: int = 0) -> Path:
    """Write ``n`` scenes of a split and return the path of their ``prompts.jsonl``.

    ``images/ID.png`` hold the pictures, ``prompts.jsonl`` rows ``{"id", "image", "prompt"}`` with
    the image path relative to the directory, ``scenes.jsonl`` the scene graphs. The same arguments
    give the same bytes; PNGs that are there already are kept.
    """
    images = directory / "images"
    images.mkdir(parents=True, exist_ok=True)
    scenes = list(scene_images(split, start, start + n))
    for name, scene in scenes:
        path = images / f"{name}.png"
        if not path.exists():
            partial = path.with_suffix(".partial")
            draw_scene(scene).save(partial, format="PNG")
            partial.replace(path)
    prompts = [
        {"id": name, "image": f"images/{name}.png", "prompt": DESCRIBE} for name, _ in scenes
    ]
    _write_rows(directory / "scenes.jsonl", ({"id": name, **asdict(s)} for name, s in scenes))
    _write_rows(directory / "prompts.jsonl", prompts)
    return directory / "prompts.jsonl"


def read_scenes(path: Path) -> dict[str, Scene]:
    """Read a ``scenes.jsonl`` back: scene by id."""
    scenes: dict[str, Scene] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        things = tuple(Thing(**thing) for thing in row["things"])
        scenes[row["id"]] = Scene(seed=row["seed"], things=things)
    return scenes


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
