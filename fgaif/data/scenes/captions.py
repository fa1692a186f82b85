"""English captions of scenes, true or wrong in ways that can be set.

"There is a small red circle. There is a blue moon, from the circle the moon is left." Each relation
stands in a piece of its own, names the earlier thing first, and says the relation word last; each
first piece has at least four words, so that splitting at commas with a minimum of four works.

A ``Noise`` says how often a caption lies and, because real models lie in recognisable places,
where: circles suggest squares, hearts are called red, what is right is called left.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from fgaif.data.scenes.world import (
    COLOURS,
    NOUNS,
    OPPOSITE,
    PARTNER,
    RELATIONS,
    SIZES,
    TYPICAL_COLOUR,
    Scene,
    relation_holds,
)

FILLERS = ("This is a simple picture.", "The background is plain.")

_RELATION_SHARE = 0.6
_MOST_MENTIONS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Probabilities of false statements, by noun or (``flip``) by relation; zero if left out.

    ``omit``: a thing is left out of scenes with more than two, which is no falsehood.
    ``phantom``: the absent partner of a noun is named right after it. ``stray``: an absent noun is
    named anywhere, per thing. ``colour``: a wrong colour, the typical one if ``typical`` is set and
    the true one differs (any other at half the rate if not). ``size``: the other size. ``flip``:
    the opposite relation, by the true one.
    """

    omit: float = 0.1
    phantom: Mapping[str, float] = field(default_factory=dict)
    stray: float = 0.0
    colour: Mapping[str, float] = field(default_factory=dict)
    typical: bool = True
    size: Mapping[str, float] = field(default_factory=dict)
    flip: Mapping[str, float] = field(default_factory=dict)


def rates(elsewhere: float, **places: float) -> dict[str, float]:
    """Return a rate for every noun: ``elsewhere``, except for the nouns named."""
    return {noun: places.get(noun, elsewhere) for noun in NOUNS}


CLEAN = Noise()
BROAD = Noise(
    stray=0.35,
    colour=rates(0.45),
    typical=False,
    size=rates(0.3),
    flip=dict.fromkeys(RELATIONS, 0.5),
)
"""Errors everywhere alike: what a truth reader should learn from."""
POLICY = Noise(
    omit=0.16,
    phantom=rates(0.06, circle=0.75, triangle=0.75, tree=0.65),
    colour=rates(0.08, heart=0.7, moon=0.7, cross=0.7, ring=0.7),
    size=rates(0.05, cross=0.5, house=0.5),
    flip={"left": 0.04, "right": 0.64, "above": 0.04, "below": 0.64},
)
"""Errors mostly in places that can be recognised, and there more often than not, so that greedy
decoding makes them too."""


def write_caption(scene: Scene, rng: random.Random, noise: Noise = CLEAN) -> str:
    """Write a caption of the scene (most things, in any order) with errors drawn from ``noise``."""
    mentions = _mentions(scene, rng, noise)
    sentences = [rng.choice(FILLERS)] if rng.random() < 0.2 else []
    for position, noun in enumerate(mentions):
        sentence = f"There is a {_adjectives(scene, noun, rng, noise)}{noun}"
        if position > 0 and rng.random() < _RELATION_SHARE:
            other = rng.choice(mentions[:position])
            relation = _relation(scene, noun, other, rng, noise)
            sentence += f", from the {other} the {noun} is {relation}"
        sentences.append(sentence + ".")
    if rng.random() < 0.1:
        sentences.append(rng.choice(FILLERS))
    return " ".join(sentences)


def _mentions(scene: Scene, rng: random.Random, noise: Noise) -> list[str]:
    nouns = list(scene.nouns)
    if len(nouns) > 2:
        nouns = [noun for noun in nouns if rng.random() >= noise.omit] or nouns[:1]
    nouns += [
        rng.choice([n for n in NOUNS if n not in scene])
        for _ in scene.things
        if rng.random() < noise.stray
    ]
    rng.shuffle(nouns)
    mentions: list[str] = []
    for noun in nouns:
        mentions.append(noun)
        partner = PARTNER[noun]
        if partner not in scene and rng.random() < noise.phantom.get(noun, 0.0):
            mentions.append(partner)
    return list(dict.fromkeys(mentions))[:_MOST_MENTIONS]


def _adjectives(scene: Scene, noun: str, rng: random.Random, noise: Noise) -> str:
    """Return "small red ", "red ", "small " or "": shares .3, .35, .15, .2."""
    colour, size = _colour(scene, noun, rng, noise), _size(scene, noun, rng, noise)
    form = rng.random()
    if form < 0.3:
        return f"{size} {colour} "
    if form < 0.65:
        return f"{colour} "
    return f"{size} " if form < 0.8 else ""


def _colour(scene: Scene, noun: str, rng: random.Random, noise: Noise) -> str:
    thing = scene.find(noun)
    if thing is None:
        return TYPICAL_COLOUR[noun] if rng.random() < 0.6 else rng.choice(COLOURS)
    rate = noise.colour.get(noun, 0.0)
    if noise.typical and thing.colour != TYPICAL_COLOUR[noun]:
        return TYPICAL_COLOUR[noun] if rng.random() < rate else thing.colour
    if rng.random() < (rate / 2 if noise.typical else rate):
        return rng.choice([colour for colour in COLOURS if colour != thing.colour])
    return thing.colour


def _size(scene: Scene, noun: str, rng: random.Random, noise: Noise) -> str:
    thing = scene.find(noun)
    size = thing.size if thing else rng.choice(SIZES)
    return SIZES[1 - SIZES.index(size)] if rng.random() < noise.size.get(noun, 0.0) else size


def _relation(scene: Scene, noun: str, other: str, rng: random.Random, noise: Noise) -> str:
    first, second = scene.find(noun), scene.find(other)
    if first is None or second is None:
        return rng.choice(RELATIONS)
    relation = rng.choice([r for r in RELATIONS if relation_holds(first, r, second)])
    return OPPOSITE[relation] if rng.random() < noise.flip.get(relation, 0.0) else relation
