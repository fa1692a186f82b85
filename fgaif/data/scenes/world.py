"""The embedded world: scenes of two to five drawn things on a 3 x 3 grid.

A scene is fully known, so the truth of every statement about it can be looked up. Ten shapes form
five partner pairs (a scene with one partner suggests the other, which is what a hallucinating
policy gets wrong), each shape has a typical colour, and three shapes are popular.

Scenes come from three splits with disjoint seed ranges. ``scene_at(split, index)`` depends on
nothing but its arguments, so any range can be made again at any time.
"""

import random
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "val", "test"]

GRID = 3
NOUNS = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon", "tree", "house")
COLOURS = ("red", "green", "blue", "yellow", "purple", "brown")
SIZES = ("small", "large")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PARTNER = {noun: NOUNS[i ^ 1] for i, noun in enumerate(NOUNS)}
TYPICAL_COLOUR = {noun: COLOURS[i % len(COLOURS)] for i, noun in enumerate(NOUNS)}
POPULAR = ("square", "star", "house")
SPLITS: tuple[Split, ...] = get_args(Split)
SPLIT_SIZE = 10**8
"""Seeds per split: split number s owns the seeds [s * SPLIT_SIZE, (s + 1) * SPLIT_SIZE)."""

_KEEP_WITH_PARTNER = 0.7  # a shape whose partner is there already is drawn again with 0.3,
_POPULAR_WEIGHT = 1.5  # so that absent partners stay frequent: they are what gets hallucinated
_TYPICAL_SHARE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One drawn object; row and column count from the upper left cell, 0 to 2."""

    noun: str
    colour: str
    size: str
    row: int
    column: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What an image shows: things with different nouns in different cells, and its jitter seed."""

    seed: int
    things: tuple[Thing, ...]

    def __contains__(self, noun: str) -> bool:
        return any(thing.noun == noun for thing in self.things)

    def find(self, noun: str) -> Thing | None:
        """Return the thing with that noun, or None when the scene has none."""
        return next((thing for thing in self.things if thing.noun == noun), None)

    @property
    def nouns(self) -> tuple[str, ...]:
        """The nouns of the things, in drawing order."""
        return tuple(thing.noun for thing in self.things)


def split_seed(split: Split, index: int) -> int:
    """Return the scene's seed; raises ValueError outside the split's range."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if not 0 <= index < SPLIT_SIZE:
        raise ValueError(f"scene index {index} is outside 0..{SPLIT_SIZE - 1} of split {split!r}")
    return SPLITS.index(split) * SPLIT_SIZE + index


def scene_at(split: Split, index: int) -> Scene:
    """Return the scene with this number, always the same one."""
    return sample_scene(split_seed(split, index))


def sample_scene(seed: int) -> Scene:
    """Draw a scene: 2-5 nouns, cells without replacement, colour typical with 0.3, any size."""
    rng = random.Random(f"fgaif scene {seed}")
    count = rng.randint(2, 5)
    weights = [_POPULAR_WEIGHT if noun in POPULAR else 1.0 for noun in NOUNS]
    nouns: list[str] = []
    while len(nouns) < count:
        noun = rng.choices(NOUNS, weights)[0]
        crowded = PARTNER[noun] in nouns and rng.random() >= _KEEP_WITH_PARTNER
        if noun not in nouns and not crowded:
            nouns.append(noun)
    cells = rng.sample(range(GRID * GRID), count)
    return Scene(
        seed=seed,
        things=tuple(
            Thing(
                noun=noun,
                colour=TYPICAL_COLOUR[noun]
                if rng.random() < _TYPICAL_SHARE
                else rng.choice(COLOURS),
                size=rng.choice(SIZES),
                row=cell // GRID,
                column=cell % GRID,
            )
            for noun, cell in zip(nouns, cells, strict=True)
        ),
    )


def relation_holds(first: Thing, relation: str, second: Thing) -> bool:
    """Say whether ``first`` is left of / right of / above / below ``second``."""
    return {
        "left": first.column < second.column,
        "right": first.column > second.column,
        "above": first.row < second.row,
        "below": first.row > second.row,
    }[relation]
