"""Dense targets on the tokens of a text about a scene, for offline pretraining only.

A tiny language model does not learn to look at the image from next-token loss alone, so throw-away
linear heads ask each depth what it should know there: what a named thing looks like (after layer
0), what was said of it and what is left to say (after layer 1), whether the two agree and which
relations hold (after layer 2), and which kinds of errors a finished piece contains (at the end).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fgaif.data.scenes.facts import class_by_kind
from fgaif.data.scenes.world import (
    COLOURS,
    GRID,
    NOUNS,
    RELATIONS,
    SIZES,
    Scene,
    Thing,
    relation_holds,
)
from fgaif.types import Kind

IGNORE = -100

Entry = tuple[int, list[int]]
"""A token position and the classes to predict there."""


@dataclass(slots=True, kw_only=True)
class Targets:
    """Targets by place. Positions count from the start of the row.

    ``nouns``: at each noun, [present, colour, size, row, column | stated colour, stated size, other
    noun's row, its column | colour match, size match]. ``relations``: at the words before and at a
    relation, [row, column, other's row, other's column | 4 truth bits, match]. ``ends``: at the end
    of each piece, its class per kind. ``sets``: where an object is about to be chosen, [present x
    10, mentioned x 10, still to name x 10]. ``subjects``: at each token, the last finished subject.
    A match is 0 for nothing to compare, 1 for right, 2 for wrong.
    """

    nouns: list[Entry] = field(default_factory=list)
    relations: list[Entry] = field(default_factory=list)
    ends: list[Entry] = field(default_factory=list)
    sets: list[Entry] = field(default_factory=list)
    subjects: list[Entry] = field(default_factory=list)


def annotate(words: Sequence[str], scene: Scene, offset: int = 0) -> Targets:
    """Annotate the words (one per token, leading space removed) of a caption or a question."""
    reader = _Reader(scene=scene)
    for position, word in enumerate(words, start=offset):
        reader.read(position, word)
    return reader.targets


@dataclass(slots=True, kw_only=True)
class _Reader:
    """Reads a text word by word, keeping what has been said in the current piece."""

    scene: Scene
    targets: Targets = field(default_factory=Targets)
    colour: str = ""
    size: str = ""
    nouns: list[str] = field(default_factory=list)
    verdicts: list[tuple[Kind, bool | None]] = field(default_factory=list)
    mentioned: set[str] = field(default_factory=set)
    subject: str = ""
    last_subject: str = ""
    naming: bool = False
    previous: str = ""

    def read(self, position: int, word: str) -> None:
        if word in COLOURS or word in SIZES:
            self.colour = word if word in COLOURS else self.colour
            self.size = word if word in SIZES else self.size
            self._choice(position)
        elif word in RELATIONS and len(self.nouns) == 2:
            self._relation(position, word)
        elif word in NOUNS:
            self._noun(position, word)
        elif word == "a" and self.previous == "is":
            self.naming = True
            self._choice(position)
        elif word == "is" and len(self.nouns) == 2:
            self._relation(position, None)
        elif word in (",", ".", "?"):
            self._end(position, word)
        elif word == "</s>" and self.targets.ends:
            self.targets.ends.append((position, self.targets.ends[-1][1]))
        self.previous = word
        index = NOUNS.index(self.last_subject) if self.last_subject else len(NOUNS)
        self.targets.subjects.append((position, [index]))

    def _noun(self, position: int, noun: str) -> None:
        thing = self.scene.find(noun)
        other = self.scene.find(self.nouns[-1]) if self.nouns else None
        stated = [
            COLOURS.index(self.colour) if self.colour else len(COLOURS),
            SIZES.index(self.size) if self.size else len(SIZES),
        ]
        seen = [int(thing is not None), *_look(thing)]
        place = [other.row, other.column] if other else [GRID, GRID]
        match = [
            _match(thing.colour if thing else "", self.colour),
            _match(thing.size if thing else "", self.size),
        ]
        self.targets.nouns.append((position, seen + stated + place + match))
        self.verdicts.append(("object", thing is not None))
        self.verdicts += [("attribute", m == 1) for m in match if m]
        self.nouns.append(noun)
        if self.naming:
            self.mentioned.add(noun)
            self.subject = noun
        self.colour = self.size = ""
        self.naming = False

    def _relation(self, position: int, word: str | None) -> None:
        """``word`` is None before the relation; the noun named last is the one that is placed."""
        first, second = self.scene.find(self.nouns[1]), self.scene.find(self.nouns[0])
        if first is None or second is None:
            self.targets.relations.append((position, [IGNORE] * 8 + [0]))
            return
        truth = [int(relation_holds(first, r, second)) for r in RELATIONS]
        match = 0 if word is None else 2 - truth[RELATIONS.index(word)]
        places = [first.row, first.column, second.row, second.column]
        self.targets.relations.append((position, [*places, *truth, match]))
        if word is not None:
            self.verdicts.append(("relation", match == 1))

    def _end(self, position: int, mark: str) -> None:
        if mark == "?" and len(self.nouns) == 2:
            self._relation(position, None)
        self.targets.ends.append((position, [int(c) for c in class_by_kind(self.verdicts)]))
        if mark == ".":
            self._choice(position)
        self.last_subject, self.subject = self.subject or self.last_subject, ""
        self.colour = self.size = ""
        self.nouns, self.verdicts, self.naming = [], [], False

    def _choice(self, position: int) -> None:
        """What could be named next, given the adjectives so far."""
        if not (self.naming or (self.targets.ends and self.targets.ends[-1][0] == position)):
            return
        fitting = [
            thing.noun
            for thing in self.scene.things
            if thing.noun not in self.mentioned
            and self.colour in ("", thing.colour)
            and self.size in ("", thing.size)
        ]
        self.targets.sets.append((position, choice_target(self.scene, self.mentioned, fitting)))


def choice_target(scene: Scene, mentioned: set[str], fitting: Sequence[str]) -> list[int]:
    """Return 3 x 10 bits by noun: present, mentioned, still to name."""
    return [
        *(int(noun in scene) for noun in NOUNS),
        *(int(noun in mentioned) for noun in NOUNS),
        *(int(noun in fitting) for noun in NOUNS),
    ]


def _look(thing: Thing | None) -> list[int]:
    if thing is None:
        return [IGNORE] * 4
    return [COLOURS.index(thing.colour), SIZES.index(thing.size), thing.row, thing.column]


def _match(true: str, stated: str) -> int:
    if not true or not stated:
        return 0
    return 1 if true == stated else 2
