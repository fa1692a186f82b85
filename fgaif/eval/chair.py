"""CHAIR: objects that captions name and images do not show (Rohrbach et al., 2018).

A ``Vocabulary`` maps words and phrases to objects: the embedded world's nouns, the 80 categories of
COCO (``fgaif.eval.chair``), or any table of one object per line.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from itertools import product
from pathlib import Path

import numpy as np
from lemminflect import getLemma

from fgaif.errors import DataError
from fgaif.eval.answers import Caption
from fgaif.eval.scored import Scored, Stats
from fgaif.types import Json

# A word, the ending of a possessive (as in "dog" + "'s"), or a punctuation mark, which ends phrases
_TOKEN = re.compile(r"[^\W_]+(?:(?:-|['’](?!s\b))[^\W_]+)*|['’]s\b|\S")
COLUMNS = ("captions", "hallucinating", "mentions", "hallucinated", "shown", "covered", "words")


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
    rows = [caption_stats(*pair) for pair in zip(mentions, objects, strict=True)]
    sums = np.array(rows, np.float64).reshape(-1, len(COLUMNS)).sum(axis=0)
    named = {k: None if math.isnan(v) else float(v) for k, v in chair_figures(sums).items()}
    return ChairScores(chair_s=named["chair_s"], chair_i=named["chair_i"], recall=named["recall"])


def caption_stats(mentions: Sequence[str], objects: Collection[str], words: int = 0) -> list[float]:
    """Count for one caption what is summed, in the order of ``COLUMNS``."""
    wrong = sum(name not in objects for name in mentions)
    shown = set(objects)
    return [1, wrong > 0, len(mentions), wrong, len(shown), len(shown & set(mentions)), words]


def chair_figures(sums: Stats) -> dict[str, Stats]:
    """Compute the figures from sums (..., 7) of ``COLUMNS``; NaN without a denominator.

    chair_i = hallucinated / mentions; chair_s = hallucinating / captions; recall = covered / shown
    (distinct objects per caption); length = words / captions.
    """
    captions, hallucinating, mentions, hallucinated, shown, covered, words = np.moveaxis(
        np.asarray(sums, np.float64), -1, 0
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "chair_i": hallucinated / mentions,
            "chair_s": hallucinating / captions,
            "recall": covered / shown,
            "length": words / captions,
        }


def chair_truth(
    instances: Mapping[str, Iterable[str]],
    references: Mapping[str, Iterable[str]],
    vocabulary: Vocabulary,
) -> dict[str, frozenset[str]]:
    """Unite per image the annotated objects with those that its reference captions name.

    ``instances`` holds category names by image (as ``answers.image_name`` gives it), ``references``
    captions. Categories that the vocabulary does not know cannot be named either, and are left out.
    """
    truth: dict[str, set[str]] = {}
    for image, categories in instances.items():
        names = {vocabulary.phrases.get(_phrase(category)) for category in categories}
        truth.setdefault(image, set()).update(name for name in names if name is not None)
    for image, captions in references.items():
        for caption in captions:
            truth.setdefault(image, set()).update(vocabulary.mentions(caption))
    return {image: frozenset(names) for image, names in truth.items()}


def score_chair(
    captions: Sequence[Caption],
    truth: Mapping[str, Collection[str]],
    vocabulary: Vocabulary,
    *,
    asked: Collection[str] = (),
) -> Scored:
    """Score captions against the objects of their images.

    Figures: ``chair_i``, ``chair_s``, ``recall``, ``length`` (mean number of words between blanks).
    A caption of an image that ``truth`` does not know is left out and counted
    (``captions_without_truth``), as is an image of ``asked`` that has no caption
    (``images_without_caption``).

    Raises:
        DataError: no caption is of a known image.
    """
    known = [caption for caption in captions if caption.image in truth]
    if not known:
        example = f"{captions[0].where}: image {captions[0].image!r}" if captions else "no captions"
        raise DataError(
            f"CHAIR: the ground truth knows no image of the captions ({example}); give annotations "
            "of the images that were captioned"
        )
    rows: list[list[float]] = []
    items: list[Json] = []
    for caption in known:
        mentions, shown = vocabulary.mentions(caption.text), truth[caption.image]
        rows.append(caption_stats(mentions, shown, len(caption.text.split())))
        items.append(_item(caption, mentions, shown))
    stats = np.array(rows, np.float64)
    return Scored(
        benchmark="chair",
        ids=tuple(caption.id for caption in known),
        units=tuple(caption.image for caption in known),
        stats=stats,
        figures=chair_figures,
        items=tuple(items),
        badness=stats[:, COLUMNS.index("hallucinated")],
        counts={
            "captions_without_truth": len(captions) - len(known),
            "images_without_caption": len(set(asked) - {caption.image for caption in captions}),
        },
    )


def _item(caption: Caption, mentions: Sequence[str], shown: Collection[str]) -> Json:
    return {
        "id": caption.id,
        "image": caption.image,
        "question": caption.question,
        "answer": caption.text,
        "named": list(mentions),
        "hallucinated": [name for name in mentions if name not in shown],
        "shown": sorted(shown),
    }


def coco_vocabulary(synonyms: Path | None = None) -> Vocabulary:
    """Read a synonym table, by default ours, and apply the rules for phrases.

    Raises:
        DataError: the file cannot be read or names no object.
    """
    data = files("fgaif.eval")
    try:
        text = (synonyms or data / "coco_words.txt").read_text(encoding="utf-8")
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
