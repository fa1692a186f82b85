"""CHAIR: objects that captions name and images do not show (Rohrbach et al., 2018).

A ``Vocabulary`` maps words and phrases to objects. The embedded world uses its nouns; a COCO table
in the official format (one line per object: its name, then synonyms) reads with ``from_lines``.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fgaif.errors import DataError

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Names of objects by phrase. ``phrases`` maps a lower-case phrase in the singular, words
    separated by one space, to its object; the longest phrase at a place wins."""

    phrases: Mapping[str, str]

    @classmethod
    def from_nouns(cls, nouns: Iterable[str]) -> "Vocabulary":
        """Make a vocabulary in which each noun names itself."""
        return cls(phrases={noun: noun for noun in nouns})

    @classmethod
    def from_lines(
        cls, lines: Iterable[str], phrases: Mapping[str, str] | None = None
    ) -> "Vocabulary":
        """Read CHAIR's table, one object per line: name, then comma-separated synonyms.

        ``phrases`` adds or overrides entries, as in "baby dog" for "dog". A synonym that stands in
        two lines belongs to the last, as in the official script.

        Raises:
            DataError: no line names an object.
        """
        table: dict[str, str] = {}
        for line in lines:
            names = [" ".join(name.lower().split()) for name in line.split(",") if name.strip()]
            table.update(dict.fromkeys(names, names[0]) if names else {})
        if not table:
            raise DataError("the synonym table is empty: give one line per object, name first")
        return cls(phrases={**table, **(phrases or {})})

    def mentions(self, text: str) -> list[str]:
        """Find the objects that a text names, in order, once for each time it does."""
        words = _WORD.findall(text.lower())
        longest = max((phrase.count(" ") + 1 for phrase in self.phrases), default=0)
        found, at = [], 0
        while at < len(words):
            for size in range(min(longest, len(words) - at), 0, -1):
                name = self._look_up(words[at : at + size])
                if name is not None:
                    found.append(name)
                    break
            else:
                size = 1
            at += size
        return found

    def _look_up(self, words: Sequence[str]) -> str | None:
        *front, last = words
        for ending in (last, *singulars(last)):
            name = self.phrases.get(" ".join([*front, ending]))
            if name is not None:
                return name
        return None


def singulars(word: str) -> list[str]:
    """Return forms that may be the singular of an English word; a look-up tells which one is."""
    if word in _IRREGULAR:
        return [_IRREGULAR[word]]
    if not word.endswith("s") or len(word) < 3:
        return []
    forms = [word[:-1]]
    if word.endswith("es"):
        forms.append(word[:-2])
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("ves"):
        forms += [word[:-3] + "f", word[:-3] + "fe"]
    return forms


@dataclass(frozen=True, slots=True, kw_only=True)
class ChairScores:
    """``chair_s``: captions with a hallucinated object / captions; ``chair_i``: hallucinated
    mentions / mentions; ``recall``: objects named / objects shown. None without a denominator."""

    chair_s: float | None
    chair_i: float | None
    recall: float | None


def chair(mentions: Sequence[Sequence[str]], objects: Sequence[Collection[str]]) -> ChairScores:
    """Score captions, each with the objects it names (repeats count) and those the image shows.

    Sums run over the corpus: a caption with many mentions weighs more in ``chair_i``.
    """
    pairs = list(zip(mentions, objects, strict=True))
    wrong = [sum(name not in truth for name in named) for named, truth in pairs]
    named_total = sum(len(named) for named in mentions)
    shown_total = sum(len(set(truth)) for truth in objects)
    covered = sum(len(set(named) & set(truth)) for named, truth in pairs)
    return ChairScores(
        chair_s=sum(count > 0 for count in wrong) / len(pairs) if pairs else None,
        chair_i=sum(wrong) / named_total if named_total else None,
        recall=covered / shown_total if shown_total else None,
    )
