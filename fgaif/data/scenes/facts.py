"""From the embedded world's English to atomic facts, and from a fact to its truth.

Fact texts are sentences that the captions themselves use: "There is a moon.", "There is a red
moon.", "There is a small moon.", "From the house the moon is left.".
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fgaif.data.scenes.captions import FILLERS
from fgaif.data.scenes.world import COLOURS, NOUNS, RELATIONS, SIZES, Scene, relation_holds
from fgaif.types import Fact, Kind, SegmentClass

SCENE_KINDS: tuple[Kind, ...] = ("object", "attribute", "relation")
"""Kinds of facts that this English can state."""

_NOUN = "|".join(NOUNS)
_THERE = re.compile(
    rf"there is a(?: ({'|'.join(SIZES)}))?(?: ({'|'.join(COLOURS)}))? ({_NOUN})", re.IGNORECASE
)
_FROM = re.compile(rf"from the ({_NOUN}) the ({_NOUN}) is ({'|'.join(RELATIONS)})", re.IGNORECASE)
_CLAUSE = re.compile(r"([^,.;!?]*)([,.;!?]|$)")
_FILLERS = frozenset(filler.rstrip(".").lower() for filler in FILLERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A fact's content: ``noun`` has ``value`` (a colour, size or relation from ``other``)."""

    kind: Kind
    noun: str
    value: str = ""
    other: str = ""

    @property
    def text(self) -> str:
        """The claim as a sentence, the canonical text of the fact."""
        if self.kind == "object":
            return f"There is a {self.noun}."
        if self.kind == "attribute":
            return f"There is a {self.value} {self.noun}."
        return f"From the {self.other} the {self.noun} is {self.value}."

    @property
    def requires(self) -> tuple[str, ...]:
        """Texts of the object facts that must hold for this claim to mean anything."""
        nouns = {"object": (), "attribute": (self.noun,), "relation": (self.other, self.noun)}
        return tuple(Claim(kind="object", noun=noun).text for noun in nouns[self.kind])


@lru_cache(maxsize=100_000)
def read_claims(text: str) -> tuple[tuple[Claim, ...], bool]:
    """Read the claims of any text, and whether all of it is well-formed English of this world.

    Well-formed: only known clauses, each ended by a comma or a stop. Unknown clauses bring no
    claims. A claim stated twice is returned once.
    """
    claims: list[Claim] = []
    wellformed = bool(text.strip())
    for clause, end in _CLAUSE.findall(text):
        words = " ".join(clause.split())
        if not words:
            wellformed &= end == ""
            continue
        found = _clause_claims(words)
        wellformed &= found is not None and end in (",", ".")
        claims += found or ()
    return tuple(dict.fromkeys(claims)), wellformed


def _clause_claims(words: str) -> list[Claim] | None:
    if words.lower() in _FILLERS:
        return []
    if match := _THERE.fullmatch(words):
        size, colour, noun = (group.lower() if group else "" for group in match.groups())
        values = [value for value in (size, colour) if value]
        return [
            Claim(kind="object", noun=noun),
            *(Claim(kind="attribute", noun=noun, value=value) for value in values),
        ]
    if match := _FROM.fullmatch(words):
        other, noun, relation = (group.lower() for group in match.groups())
        if noun == other:
            return None
        return [
            Claim(kind="object", noun=other),
            Claim(kind="object", noun=noun),
            Claim(kind="relation", noun=noun, value=relation, other=other),
        ]
    return None


def parse_facts(text: str, segment: int = 0) -> tuple[list[Fact], bool]:
    """Return the atomic facts of a segment's text, and whether the text is well-formed."""
    claims, wellformed = read_claims(text)
    facts = [
        Fact(kind=claim.kind, text=claim.text, segment=segment, requires=claim.requires)
        for claim in claims
    ]
    return facts, wellformed


def oracle(scene: Scene, fact: Fact | str) -> bool | None:
    """Say whether a fact (or its text) holds; None when a thing it presupposes is not there.

    Raises ValueError for a text that is not exactly one fact of this world.
    """
    text = fact if isinstance(fact, str) else fact.text
    claims, wellformed = read_claims(text)
    if not claims or not wellformed or claims[-1].text != text:
        raise ValueError(f"not an atomic fact of the embedded world: {text!r}")
    return claim_holds(scene, claims[-1])


def claim_holds(scene: Scene, claim: Claim) -> bool | None:
    """Look the claim up; None when a noun that it presupposes is absent."""
    thing = scene.find(claim.noun)
    if claim.kind == "object":
        return thing is not None
    if thing is None:
        return None
    if claim.kind == "attribute":
        return claim.value in (thing.colour, thing.size)
    other = scene.find(claim.other)
    return None if other is None else relation_holds(thing, claim.value, other)


def class_by_kind(verdicts: Iterable[tuple[Kind, bool | None]]) -> tuple[SegmentClass, ...]:
    """Sum up (kind, verdict) pairs as one class per kind of this world: any false HALLU, else OK,
    else NONE."""
    classes = dict.fromkeys(SCENE_KINDS, SegmentClass.NONE)
    for kind, verdict in verdicts:
        if verdict is False:
            classes[kind] = SegmentClass.HALLU
        elif verdict and classes[kind] is SegmentClass.NONE:
            classes[kind] = SegmentClass.OK
    return tuple(classes[kind] for kind in SCENE_KINDS)


def oracle_classes(scene: Scene, segments: Sequence[str]) -> list[tuple[SegmentClass, ...]]:
    """Return the true class of each segment text for each kind of this world."""
    return [
        class_by_kind((claim.kind, claim_holds(scene, claim)) for claim in read_claims(text)[0])
        for text in segments
    ]
