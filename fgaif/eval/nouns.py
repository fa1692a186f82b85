"""Nouns of a text that stand in a list of words, by rules and a dictionary of forms.

Stands in for a part-of-speech tagger and a lemmatiser, which would have to be downloaded:
lemminflect's dictionary says which parts of speech a form can be, and where a form can be more than
a noun, the words beside it decide.
"""

import re
from collections.abc import Collection
from functools import lru_cache

from lemminflect import getAllLemmas

from fgaif.eval.vocabulary import singular

_TOKEN = re.compile(r"[^\W_]+(?:(?:-|['’](?!s\b))[^\W_]+)*|['’]s\b|\S")
_IRREGULAR = {"leaves": "leaf"}  # lemminflect's first reading is "leave"


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_DETERMINERS = _set(
    "a an the this that these those his her its their our my your some any no each every another "
    "one two three four five six seven eight nine ten several many few various multiple other 's "
    "’s of in on at with by for from near beside behind under over into onto"
)
_SUBJECTS = _set("i you he she it we they who that which there people")
_BEFORE_VERBS = _set(
    "can could will would shall should may might must do does did don't doesn't not to also"
)
_TO_THINGS = _set("next close adjacent due similar addition attached connected near")
_OBJECTS = _set("a an the him her them it his their its this these")
_FUNCTION = _set(
    "is are was were be been being has have had and or but of in on at with by for from to as near "
    "beside behind under over into onto that which who where while"
)


def nouns_among(text: str, words: Collection[str]) -> list[str]:
    """Return the nouns of ``text``, singular, that are among ``words``, in order, with repeats.

    Upper and lower case differ, as in AMBER's script: "Dogs" at the beginning of a sentence is
    neither "dog" nor "dogs".
    """
    tokens = _TOKEN.findall(text)
    found = []
    for place, token in enumerate(tokens):
        form = _singular(token)
        if form in words and _is_noun(tokens, place):
            found.append(form)
    return found


@lru_cache(maxsize=1 << 16)
def _singular(token: str) -> str:
    return token if token != token.lower() else _IRREGULAR.get(token) or singular(token)


@lru_cache(maxsize=1 << 16)
def _readings(token: str) -> frozenset[str]:
    """Parts of speech that a form can be; empty for one that the dictionary lacks."""
    return frozenset(getAllLemmas(token))


def _is_noun(tokens: list[str], place: int) -> bool:
    """Whether the token at a place is a noun there."""
    readings = _readings(tokens[place])
    if readings <= {"NOUN", "PROPN"}:
        return True
    if "NOUN" not in readings:
        return False
    before = tokens[place - 1].lower() if place else ""
    after = tokens[place + 1].lower() if place + 1 < len(tokens) else ""
    if "AUX" in readings and (before in _SUBJECTS or _readings(after) & {"AUX", "VERB", "ADV"}):
        return False
    beside = _readings(after)
    if "ADJ" in readings and beside & {"NOUN", "ADJ"} and "AUX" not in beside:
        return after in _FUNCTION
    return not ("VERB" in readings and _is_verb(tokens, place, before, after))


def _is_verb(tokens: list[str], place: int, before: str, after: str) -> bool:
    if before in _DETERMINERS or not before.isalpha():
        return False
    if before == "to":
        return place < 2 or tokens[place - 2].lower() not in _TO_THINGS
    if before in _BEFORE_VERBS | (_SUBJECTS - {"that"}):
        return True
    return after in _OBJECTS and (before == "and" or "NOUN" in _readings(before))
