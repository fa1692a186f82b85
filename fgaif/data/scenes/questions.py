"""What is asked about a scene: describe it, verify a statement, POPE, and open questions."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fgaif.data.scenes.facts import SCENE_KINDS, Claim, claim_holds
from fgaif.data.scenes.world import (
    COLOURS,
    NOUNS,
    PARTNER,
    POPULAR,
    RELATIONS,
    SIZES,
    Scene,
    relation_holds,
)
from fgaif.types import Kind

DESCRIBE = "Describe this image in detail."

PopeStrategy = Literal["random", "popular", "adversarial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with its true answer: "yes", "no", or a few words for an open question."""

    text: str
    answer: str


def verify_question(fact_text: str) -> str:
    """Return the question that puts a fact to the verifier."""
    return f"Statement: {fact_text} Is this right?"


def pope_question(noun: str) -> str:
    """Return POPE's question about an object."""
    return f"Is there a {noun} in the image?"


def pope_pair(
    scene: Scene, strategy: PopeStrategy, rng: random.Random
) -> tuple[Question, Question] | None:
    """Return one yes and one no question, the absent noun chosen by POPE's strategy.

    random: any absent noun; popular: an absent popular noun; adversarial: the absent partner of a
    thing that is there. None when the scene leaves no such noun.
    """
    absent = [noun for noun in NOUNS if noun not in scene]
    if strategy == "popular":
        absent = [noun for noun in absent if noun in POPULAR]
    elif strategy == "adversarial":
        absent = [noun for noun in absent if PARTNER[noun] in scene]
    if not absent:
        return None
    present, missing = rng.choice(scene.nouns), rng.choice(absent)
    return (
        Question(text=pope_question(present), answer="yes"),
        Question(text=pope_question(missing), answer="no"),
    )


def sample_claim(scene: Scene, kind: Kind, rng: random.Random) -> Claim:
    """Draw a claim of the kind about things that are there, true in half of the cases.

    Absent objects are partners of present ones half of the time.
    """
    holds = rng.random() < 0.5
    thing = rng.choice(scene.things)
    if kind == "object":
        return Claim(kind=kind, noun=thing.noun if holds else _absent_noun(scene, rng))
    if kind == "attribute":
        values, own = (COLOURS, thing.colour) if rng.random() < 0.65 else (SIZES, thing.size)
        value = own if holds else rng.choice([v for v in values if v != own])
        return Claim(kind=kind, noun=thing.noun, value=value)
    other = rng.choice([t for t in scene.things if t != thing])
    fitting = [r for r in RELATIONS if relation_holds(thing, r, other) == holds]
    return Claim(kind=kind, noun=thing.noun, value=rng.choice(fitting), other=other.noun)


def _absent_noun(scene: Scene, rng: random.Random) -> str:
    absent = [noun for noun in NOUNS if noun not in scene]
    partners = [noun for noun in absent if PARTNER[noun] in scene]
    return rng.choice(partners if partners and rng.random() < 0.5 else absent)


def sample_question(
    scene: Scene, rng: random.Random, open_share: float = 0.0, kind: Kind | None = None
) -> Question:
    """Draw a question; attributes and relations are asked openly with ``open_share``."""
    asked: Kind = rng.choice(SCENE_KINDS) if kind is None else kind
    if asked != "object" and rng.random() < open_share:
        return _open_question(scene, asked, rng)
    return ask(sample_claim(scene, asked, rng), scene, rng)


def ask(
    claim: Claim,
    scene: Scene,
    rng: random.Random,
    false_yes: Mapping[str, float] | None = None,
) -> Question:
    """Ask about a claim; ``false_yes`` gives, by noun, how often an absent object gets a yes."""
    yes = bool(claim_holds(scene, claim))
    if claim.kind == "object" and not yes and false_yes:
        yes = rng.random() < false_yes.get(claim.noun, 0.0)
    as_pope = claim.kind == "object" and rng.random() < 0.5
    text = pope_question(claim.noun) if as_pope else verify_question(claim.text)
    return Question(text=text, answer="yes" if yes else "no")


def _open_question(scene: Scene, kind: Kind, rng: random.Random) -> Question:
    if kind == "attribute":
        thing = rng.choice(scene.things)
        return Question(text=f"What is the {thing.noun}?", answer=f"{thing.size} {thing.colour}")
    thing, other = rng.sample(scene.things, 2)
    relation = rng.choice([r for r in RELATIONS if relation_holds(thing, r, other)])
    return Question(text=f"From the {other.noun} where is the {thing.noun}?", answer=relation)
