"""Objects that a text names, by a table of words and phrases.

A ``Vocabulary`` maps words and phrases to objects: the embedded world's nouns, the 80 categories of
COCO (``coco_vocabulary``), or any table of one object per line.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from itertools import product
from pathlib import Path

from lemminflect import getLemma

from fgaif.errors import DataError

# A word, the ending of a possessive (as in "dog" + "'s"), or a punctuation mark, which ends phrases
_TOKEN = re.compile(r"[^\W_]+(?:(?:-|['’](?!s\b))[^\W_]+)*|['’]s\b|\S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Names of objects by phrase.

    ``phrases`` maps a lower-case phrase, its last word in the singular, to an object, or to None
    if it names none, as "home plate" is no plate; the longest phrase at a place wins.
    ``dropped_beside`` maps a phrase to a word: beside that word in the same text the phrase names
    nothing, as the seat of a toilet is no chair.
    """

    phrases: Mapping[str, str | None]
    dropped_beside: Mapping[str, str] = field(default_factory=dict)
    _longest: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        longest: dict[str, int] = {}
        for first, *rest in map(str.split, self.phrases):
            longest[first] = max(longest.get(first, 0), 1 + len(rest))
        object.__setattr__(self, "_longest", longest)

    @property
    def objects(self) -> frozenset[str]:
        """The objects that have a name here."""
        return frozenset(name for name in self.phrases.values() if name is not None)

    def object_named(self, name: str) -> str | None:
        """Return the object that a whole name stands for; None if it is not known."""
        return self.phrases.get(_phrase(name))

    @classmethod
    def from_nouns(cls, nouns: Iterable[str]) -> "Vocabulary":
        """Make a vocabulary in which each noun names itself."""
        return cls(phrases={_phrase(noun): noun for noun in nouns})

    @classmethod
    def from_lines(
        cls,
        lines: Iterable[str],
        same_as: Mapping[str, str | None] | None = None,
        dropped_beside: Mapping[str, str] | None = None,
    ) -> "Vocabulary":
        """Read CHAIR's table, one object per line: name, then comma-separated synonyms.

        ``same_as`` adds phrases that the table lacks: each names what another word names, as
        "baby dog" what "dog" does, or nothing, if that word is None or unknown. A synonym that
        stands in two lines belongs to the last, as in the official script.

        Raises:
            DataError: no line names an object.
        """
        table: dict[str, str | None] = {}
        for line in lines:
            names = [" ".join(name.lower().split()) for name in line.split(",") if name.strip()]
            table.update({_phrase(name): names[0] for name in names})
        if not table:
            raise DataError("the synonym table is empty: give one line per object, name first")
        extra = {
            _phrase(phrase): table.get(_phrase(word)) if word else None
            for phrase, word in (same_as or {}).items()
        }
        return cls(phrases={**extra, **table}, dropped_beside=dropped_beside or {})

    def mentions(self, text: str) -> list[str]:
        """Find the objects that a text names, in order, once for each time it does."""
        tokens = tokenize(text)
        forms = [singular(token) for token in tokens]
        found: list[tuple[str, str]] = []
        at = 0
        while at < len(tokens):
            size = 1
            longest = max(self._longest.get(tokens[at], 0), self._longest.get(forms[at], 0))
            for size in range(longest, 0, -1):
                phrase = self._known(tokens[at : at + size], forms[at : at + size])
                if phrase is not None:
                    name = self.phrases[phrase]
                    found += [(phrase, name)] if name is not None else []
                    break
            at += size
        dropped = {phrase for phrase, beside in self.dropped_beside.items() if beside in forms}
        return [name for phrase, name in found if phrase not in dropped]

    def _known(self, words: Sequence[str], forms: Sequence[str]) -> str | None:
        for phrase in (" ".join(words), " ".join([*words[:-1], forms[-1]]), " ".join(forms)):
            if phrase in self.phrases:
                return phrase
        return None


def tokenize(text: str) -> list[str]:
    """Cut a text into lower-case words and single punctuation marks; "dog's" gives "dog", "'s"."""
    return _TOKEN.findall(text.lower())


def _phrase(text: str) -> str:
    return " ".join(tokenize(text))


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """Return the singular of a lower-case English noun; a verb's or unknown form stays as it is."""
    return str(getLemma(word, upos="NOUN")[0]) or word


def coco_vocabulary(synonyms: Path | None = None) -> Vocabulary:
    """Read a synonym table, by default ours, and apply the rules for phrases.

    Raises:
        DataError: the file cannot be read or names no object.
    """
    data = files("fgaif.eval")
    try:
        text = (synonyms or data / "coco_words.txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{synonyms}: cannot be read ({error}); give a text file, one object per line"
        ) from error
    rules = json.loads((data / "coco_phrases.json").read_text(encoding="utf-8"))
    same_as: dict[str, str | None] = {
        **dict.fromkeys(rules["name_nothing"]),
        **rules["same_as"],
        **{
            f"{qualifier} {word}": word
            for rule in rules["qualified"]
            for qualifier, word in product(rule["by"], rule["words"])
        },
    }
    return Vocabulary.from_lines(text.split("\n"), same_as, rules["dropped_beside"])
