"""Read a language model's reply into atomic facts: strictly, and with a count of what is left out.

A reply is JSON, bare or in a code fence, ``{"segments": [{"KIND": [..], "KIND": [..]}, ..]}`` with
one entry per segment, or the plain-text form::

    Segment 1
    KIND: There is a dog.
    KIND: There is a black dog.
    Segment 2
    none

It is unreadable as a whole, and never guessed at, if an entry is missing or one too many, a kind is
missing or unknown, a statement is no text, or (text form) a line is none of the above: what is
misplaced in one segment may be missing in another, and "no fact" is a label too.

Of a readable reply are left out, and counted by these names:

- ``empty``: no words, or that there is nothing to say ("none", "N/A", "No facts.").
- ``duplicate``: said before in this segment and kind; it would be judged, not counted, twice.
- ``foreign``: of a segment number that there is not (text form only), or without one content word
  in common with the response: what a model repeats of the prompt's examples. Words are compared by
  English stems, so plurals and forms in -ing and -ed agree; "a person" is in common with "a man",
  and so are other words for a whole group.
- ``long``: more than 160 characters; that is no atomic fact, but a description.
- ``excess``: beyond the allowed number of facts of a kind; mostly a model in a loop.

After the last two, and after a foreign fact within a segment, the segment is malformed: it says
more than is going to be judged. So it can still turn out hallucinated, but never clean or empty.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache

from pydantic import BaseModel, ConfigDict

from fgaif.feedback.facts import ExtractedFacts
from fgaif.types import Fact, Json, Kind

MAX_LENGTH = 160
_FENCED = re.compile(r"```(?:json)?\s(.*?)```", re.DOTALL | re.IGNORECASE)
_HEADER = re.compile(r"\W*+segment\s+([0-9]{1,6})\W*+", re.IGNORECASE)
_NOTHING = re.compile(
    r"[\W_]*+(none(?: (?:is |are )?(?:mentioned|stated|found|given|present))?|n\W?a|nil|null"
    r"|nothing|empty|not (?:applicable|mentioned|stated|found|given|present)"
    r"|(?:there (?:are|is) |th(?:is|e) (?:segment|sentence|text) (?:states|has|contains) )?"
    r"no (?:atomic )?(?:\w+ )?(?:facts?|statements?|objects?|attributes?|relations?)"
    r"(?: (?:are |is )?(?:mentioned|stated|found|given|present))?)?[\W_]*+",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+")
_ENDING = re.compile(r"(?<=\w{3})(?:ings?|eds?|es|s|e)$")
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
    "knives": "knife",
    "shelves": "shelf",
    "leaves": "leaf",
    "lying": "lie",
}
_FUNCTION_WORDS = frozenset(
    _WORD.findall(
        "a an the this that these those some any all each every both other another one there here "
        "it its they them their he him his she her i we you who which what where when while and or "
        "but not no nor so as if than then too very also just only is are was were be been being "
        "am has have had having do does did can could may might must shall should will would seem "
        "seems appear appears of in on at by to from for with without into onto over under near up "
        "down out off about around between among behind beside next two three four five six"
    )
)


class _Entries(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    segments: list[dict[Kind, list[str]]]


def facts_schema(segments: int, max_facts: int, kinds: Sequence[Kind]) -> Json:
    """JSON schema of a reply: per segment and kind a list of statements.

    A list may hold one more than ``max_facts``: held to the very number, a model that has more to
    say could not be told from one that is done. The length of strings is not limited, because some
    endpoints refuse schemas that do, and because a statement cut short still looks like one.
    """
    statements = {"type": "array", "items": {"type": "string"}, "maxItems": max_facts + 1}
    entry = {
        "type": "object",
        "properties": dict.fromkeys(kinds, statements),
        "required": list(kinds),
        "additionalProperties": False,
    }
    entries = {"type": "array", "items": entry, "minItems": segments, "maxItems": segments}
    return {
        "type": "object",
        "properties": {"segments": entries},
        "required": ["segments"],
        "additionalProperties": False,
    }


def read_facts(
    text: str, *, asked: Sequence[int], described: str, max_facts: int, kinds: Sequence[Kind]
) -> ExtractedFacts | None:
    """Read a reply; None if it is unreadable.

    Args:
        asked: the indexes of the segments in the order of their numbers, which start at 1.
        described: the whole response.
        max_facts: facts of one kind in one segment.
        kinds: that an entry must have, no more and no fewer.
    """
    dropped: Counter[str] = Counter()
    try:
        entries = _entries(text, len(asked), kinds, dropped)
    except (ValueError, RecursionError):  # RecursionError: JSON of a thousand brackets
        return None
    known = _stems(described)
    words = {_stem(word) for word in _WORD.findall(described.lower())}
    known |= {group for group, members in _GROUPS.items() if members & words}
    facts: list[Fact] = []
    malformed: list[int] = []
    for index, entry in zip(asked, entries, strict=True):
        lost: Counter[str] = Counter()
        for kind in kinds:
            kept = _keep(entry[kind], known, max_facts, lost)
            facts += (Fact(kind=kind, text=statement, segment=index) for statement in kept)
        if lost.keys() & {"foreign", "long", "excess"}:
            malformed.append(index)
        dropped += lost
    return ExtractedFacts(facts=tuple(facts), malformed=tuple(malformed), dropped=dict(dropped))


def _keep(
    values: Sequence[str], known: Collection[str], max_facts: int, lost: Counter[str]
) -> list[str]:
    """Return the facts worth judging; ``lost`` counts the others."""
    kept: dict[str, str] = {}
    for value in values[:max_facts]:
        text = " ".join(value.split())
        same = text.casefold().rstrip(".! ")
        if _NOTHING.fullmatch(text):
            lost["empty"] += 1
        elif same in kept:
            lost["duplicate"] += 1
        elif len(text) > MAX_LENGTH:
            lost["long"] += 1
        elif _stems(text).isdisjoint(known):
            lost["foreign"] += 1
        else:
            kept[same] = text
    if len(values) > max_facts:
        lost["excess"] += len(values) - max_facts
    return list(kept.values())


def _entries(
    text: str, count: int, kinds: Sequence[Kind], dropped: Counter[str]
) -> list[dict[Kind, list[str]]]:
    """Read either form; both go through the same checks."""
    fenced = _FENCED.search(text)
    try:
        data = json.loads(fenced[1] if fenced else text, object_pairs_hook=_distinct)
    except ValueError:
        data = _text_form(text, count, kinds, dropped)
    entries = _Entries.model_validate(data).segments
    json.dumps(data, ensure_ascii=False).encode()  # raises on half characters (lone surrogates)
    if len(entries) != count:
        raise ValueError(f"{len(entries)} entries for {count} segments")
    if any(entry.keys() != set(kinds) for entry in entries):
        raise ValueError("a kind is missing or unknown")
    return entries


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse an object that names a key twice: the first list would be lost without a trace."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _text_form(text: str, count: int, kinds: Sequence[Kind], dropped: Counter[str]) -> Json:
    """Read the plain-text form into what the JSON would have been; words before it are ignored."""
    stating = _stating(tuple(kinds))
    blocks: dict[int, dict[str, list[str]]] = {}
    answered: set[int] = set()
    number = 0
    for line in text.splitlines():
        if header := _HEADER.fullmatch(line):
            number = int(header[1])
            if number in blocks:
                raise ValueError(f"segment {number} is there twice")
            blocks[number] = {kind: [] for kind in kinds}
        elif stated := stating.fullmatch(line):
            if not blocks:
                raise ValueError("a fact before the first segment")
            # An empty line of a kind is how this form says that there is nothing to say.
            if not _NOTHING.fullmatch(stated[2]):
                blocks[number][stated[1].lower()].append(stated[2])
            answered.add(number)
        elif nothing := _NOTHING.fullmatch(line):
            answered |= {number} if nothing[1] else set()
        elif blocks:
            raise ValueError(f"neither a segment nor a fact: {line!r}")
    numbers = set(range(1, count + 1))
    if not numbers <= answered & blocks.keys():
        raise ValueError("a segment is missing")
    foreign = [block for number, block in blocks.items() if number not in numbers]
    dropped["foreign"] += sum(len(stated) for block in foreign for stated in block.values())
    return {"segments": [blocks[number] for number in sorted(numbers)]}


@cache
def _stating(kinds: tuple[Kind, ...]) -> re.Pattern[str]:
    """A line that states a fact: its kind, also in the plural and in bold, a colon, the fact."""
    return re.compile(
        rf"[\s*•-]*+({'|'.join(kinds)})s?[\s*]*+:[\s*]*+(.*)", re.IGNORECASE | re.DOTALL
    )


def _stems(text: str) -> set[str]:
    """Return the stems of the words that carry meaning."""
    return {_stem(word) for word in _WORD.findall(text.lower()) if word not in _FUNCTION_WORDS}


def _stem(word: str) -> str:
    """Cut an English ending: sitting, sits -> sit; buildings -> build; skies, sky -> ski."""
    word = _ENDING.sub("", _IRREGULAR.get(word, word))
    word = word[:-1] if len(word) > 3 and word[-1] == word[-2] else word
    return f"{word[:-1]}i" if word.endswith("y") else word


def _group(words: str) -> frozenset[str]:
    return frozenset(_stem(word) for word in words.split())


# Words for a group, each with words of a response that a language model restates by it.
_GROUPS = {
    "person": _group(
        "man woman child boy girl kid baby lady guy gentleman adult teenager toddler player rider "
        "skier surfer snowboarder skateboarder worker driver passenger chef cook pedestrian crowd "
        "spectator couple batter pitcher catcher umpire officer cyclist biker he she someone"
    ),
    "animal": _group(
        "dog cat horse cow sheep bird elephant bear zebra giraffe puppy kitten goat duck"
    ),
    "vehicl": _group(
        "car bus truck train boat airplane plane motorcycle bicycle van taxi jet ship"
    ),
}
