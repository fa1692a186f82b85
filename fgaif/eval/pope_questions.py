"""POPE's questions: drawn by the official sampling rule, read from and written to official files.

Per image three objects that it shows and three that it does not, the absent ones drawn at random,
by how common they are (popular), or by how often they go with a shown one (adversarial).
"""

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fgaif.data.coco import read_coco
from fgaif.data.scenes.files import read_scenes, write_split
from fgaif.data.scenes.world import NOUNS, Split
from fgaif.errors import DataError
from fgaif.eval.answers import check_ids
from fgaif.eval.rows import read_rows
from fgaif.eval.yes_no import YesNoQuestion
from fgaif.files import write_whole
from fgaif.types import ImageRef, Json

Strategy = Literal["random", "popular", "adversarial"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

_CONSONANT = re.compile(r"eu|ewe|one\b|once|uk|uni(?![nm])|us[aeiu]|ute")  # sounds of y and w
_SILENT_H = re.compile(r"hour|heir|hono")
_PAIRS = {"scissors", "skis", "glasses", "sunglasses", "goggles", "pants", "trousers", "jeans"}
_MASS = {"broccoli"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PopeQuestion:
    """A yes/no question about one object; ``label`` is True when the image shows it."""

    image: ImageRef
    strategy: Strategy
    object: str
    label: bool

    @property
    def text(self) -> str:
        """The question, for example "Is there a moon in the image?"."""
        return question_text(self.object)


def question_text(noun: str) -> str:
    """Ask for an object: "a dog", "an umbrella", "a pair of skis", or "broccoli" alone."""
    if noun in _MASS:
        return f"Is there {noun} in the image?"
    counted = f"pair of {noun}" if noun in _PAIRS else noun
    return f"Is there {indefinite(counted)} {counted} in the image?"


def indefinite(noun: str) -> str:
    """Choose "a" or "an" by the sound of the first word: "an hour", "a unicycle"."""
    word = noun.lower()
    vowel = word[:1] in set("aeiou") and not _CONSONANT.match(word)
    return "an" if vowel or _SILENT_H.match(word) else "a"


def build_questions(
    images: Sequence[tuple[ImageRef, Sequence[str]]],
    strategy: Strategy,
    *,
    per_image: int = 6,
    seed: int = 0,
    related: Mapping[str, Sequence[str]] | None = None,
) -> list[PopeQuestion]:
    """Build balanced questions: the first ``per_image // 2`` objects, each with an absent one.

    Absent objects come from those that any of the images shows; an image never gets one twice.
    popular takes the most frequent, adversarial the one that most often stands beside the shown
    object (``related`` replaces the counted order), and both fall back to a random one. An image
    with fewer objects, or fewer absent ones, brings fewer pairs.

    Raises:
        DataError: no image shows any object.
    """
    drawn = _draw([names for _, names in images], strategy, per_image, seed, related)
    return [
        PopeQuestion(image=image, strategy=strategy, object=name, label=label)
        for (image, _), pairs in zip(images, drawn, strict=True)
        for name, label in pairs
    ]


def build_rows(
    images: Sequence[tuple[str, Sequence[str]]],
    strategy: Strategy,
    *,
    count: int | None = 500,
    per_image: int = 6,
    seed: int = 0,
    related: Mapping[str, Sequence[str]] | None = None,
) -> list[YesNoQuestion]:
    """Build a file's questions from (image file, objects in annotation order), numbered from 1.

    As in the official set, only images with at least ``per_image // 2`` distinct objects take
    part, ``count`` of them are drawn (all if None), and frequencies count the drawn ones alone.
    The same ``seed`` draws the same images for every strategy; ``related`` as above.

    Raises:
        DataError: fewer such images than ``count``, or none.
    """
    wanted = per_image // 2
    rich = [(image, names) for image, names in images if len(set(names)) >= wanted]
    if len(rich) < (count or 1):
        raise DataError(
            f"POPE: {len(rich)} of {len(images)} images show {wanted} objects or more, but "
            f"{count or 1} are needed; give more annotated images or ask for fewer"
        )
    drawn = rich if count is None else random.Random(f"pope images {seed}").sample(rich, count)
    pairs_of = _draw([names for _, names in drawn], strategy, per_image, seed, related)
    flat = [
        (image, *pair) for (image, _), pairs in zip(drawn, pairs_of, strict=True) for pair in pairs
    ]
    return [
        YesNoQuestion(
            where=f"question {n}", id=str(n), image=image, text=question_text(name), label=label
        )
        for n, (image, name, label) in enumerate(flat, start=1)
    ]


def _draw(
    objects: Sequence[Sequence[str]],
    strategy: Strategy,
    per_image: int,
    seed: int,
    related: Mapping[str, Sequence[str]] | None,
) -> list[list[tuple[str, bool]]]:
    """Choose for each image (object, whether it shows it), shown and absent by turns."""
    rng = random.Random(f"pope {strategy} {seed}")
    counts = Counter(name for names in objects for name in dict.fromkeys(names))
    if not counts:
        raise DataError("POPE needs images with at least one known object; none of them has any")
    popular = [name for name, _ in counts.most_common()]
    beside = related if related is not None else co_occurrence(objects)
    drawn: list[list[tuple[str, bool]]] = []
    for names in objects:
        used = set(names)
        drawn.append([])
        for shown in list(dict.fromkeys(names))[: per_image // 2]:
            ranked = {"random": (), "popular": popular, "adversarial": beside.get(shown, ())}
            absent = _absent(ranked[strategy], used, popular, rng)
            if absent is None:
                break
            used.add(absent)
            drawn[-1] += [(shown, True), (absent, False)]
    return drawn


def _absent(
    ranked: Sequence[str], used: set[str], names: Sequence[str], rng: random.Random
) -> str | None:
    free = [name for name in ranked if name not in used]
    if free:
        return free[0]
    rest = [name for name in names if name not in used]
    return rng.choice(rest) if rest else None


def co_occurrence(objects: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Rank for each object the others by the number of images that show both."""
    counts: dict[str, Counter[str]] = {}
    for names in objects:
        distinct = list(dict.fromkeys(names))
        for name in distinct:
            counts.setdefault(name, Counter()).update(n for n in distinct if n != name)
    return {name: [other for other, _ in counter.most_common()] for name, counter in counts.items()}


def write_questions(path: Path, rows: Sequence[YesNoQuestion]) -> None:
    """Write questions in the official format, a JSON object per line."""
    lines = [
        {
            "question_id": int(row.id) if row.id.isdecimal() else row.id,
            "image": row.image,
            "text": row.text,
            "label": "yes" if row.label else "no",
        }
        for row in rows
    ]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_questions(path: Path) -> list[YesNoQuestion]:
    """Read the official format: ``question_id``, ``image``, ``text``, ``label`` (yes or no).

    Raises:
        DataError: the file or a row cannot be used (names row and key), or an id comes twice.
    """
    rows = []
    for row in read_rows(path):
        label = row.text("label").strip().lower()
        if label not in ("yes", "no"):
            raise row.wrong("label", label, "yes or no")
        rows.append(
            YesNoQuestion(
                where=row.where,
                id=row.identity("question_id"),
                image=row.text("image"),
                text=row.text("text"),
                label=label == "yes",
            )
        )
    check_ids((row.where, row.id) for row in rows)
    return rows


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
