"""POPE: does the policy say that absent objects are there? (Li et al., 2023)

Per image three objects that it shows and three that it does not, the absent ones drawn at random,
by how common they are (popular), or by how often they go with a shown one (adversarial).
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from fgaif.errors import DataError
from fgaif.types import ImageRef, PopeMetrics

Strategy = Literal["random", "popular", "adversarial"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, slots=True, kw_only=True)
class PopeQuestion:
    """A yes/no question about one object; ``label`` is True when the image shows it."""

    image: ImageRef
    strategy: Strategy
    object: str
    label: bool

    @property
    def text(self) -> str:
        """The question, for example "Is there a moon in the image?"."""
        return f"Is there {indefinite(self.object)} {self.object} in the image?"


def indefinite(noun: str) -> str:
    """Choose "a" or "an" by the first letter, the rule of the official questions."""
    return "an" if noun[:1].lower() in "aeiou" else "a"


def build_questions(
    images: Sequence[tuple[ImageRef, Sequence[str]]],
    strategy: Strategy,
    *,
    per_image: int = 6,
    seed: int = 0,
    related: Mapping[str, Sequence[str]] | None = None,
) -> list[PopeQuestion]:
    """Build balanced questions: the first ``per_image // 2`` objects, each with an absent one.

    Absent objects come from those that any of the images shows; an image never gets one twice.
    popular takes the most frequent, adversarial the one that most often stands beside the shown
    object (``related`` replaces the counted order), and both fall back to a random one. An image
    with fewer objects, or fewer absent ones, brings fewer pairs.

    Raises:
        DataError: no image shows any object.
    """
    rng = random.Random(f"pope {strategy} {seed}")
    counts = Counter(name for _, objects in images for name in dict.fromkeys(objects))
    if not counts:
        raise DataError("POPE needs images with at least one known object; none of them has any")
    popular = [name for name, _ in counts.most_common()]
    beside = related if related is not None else co_occurrence([o for _, o in images])
    questions: list[PopeQuestion] = []
    for image, objects in images:
        used = set(objects)
        for shown in list(dict.fromkeys(objects))[: per_image // 2]:
            ranked = {"random": (), "popular": popular, "adversarial": beside.get(shown, ())}
            absent = _absent(ranked[strategy], used, popular, rng)
            if absent is None:
                break
            used.add(absent)
            questions += [
                PopeQuestion(image=image, strategy=strategy, object=shown, label=True),
                PopeQuestion(image=image, strategy=strategy, object=absent, label=False),
            ]
    return questions


def _absent(
    ranked: Sequence[str], used: set[str], names: Sequence[str], rng: random.Random
) -> str | None:
    free = [name for name in ranked if name not in used]
    if free:
        return free[0]
    rest = [name for name in names if name not in used]
    return rng.choice(rest) if rest else None


def co_occurrence(objects: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Rank for each object the others by the number of images that show both."""
    counts: dict[str, Counter[str]] = {}
    for names in objects:
        distinct = list(dict.fromkeys(names))
        for name in distinct:
            counts.setdefault(name, Counter()).update(n for n in distinct if n != name)
    return {name: [other for other, _ in counter.most_common()] for name, counter in counts.items()}


def read_answer(text: str) -> bool:
    """Read a free answer by the official rule, here for any case: the word "no" or "not" before
    the first full stop means no, anything else means yes."""
    words = text.split(".")[0].replace(",", "").casefold().split()
    return not {"no", "not"} & set(words)


def pope_metrics(answers: Sequence[bool], labels: Sequence[bool]) -> PopeMetrics:
    """Score answers against labels, True meaning yes; a figure without a denominator is 0.

    Raises:
        DataError: no answers, or another number of answers than of labels.
    """
    if not answers or len(answers) != len(labels):
        raise DataError(f"POPE: {len(answers)} answers for {len(labels)} questions")
    pairs = list(zip(answers, labels, strict=True))
    hits = sum(answer and label for answer, label in pairs)
    said, true = sum(answers), sum(labels)
    precision = hits / said if said else 0.0
    recall = hits / true if true else 0.0
    return PopeMetrics(
        accuracy=sum(answer == label for answer, label in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_ratio=said / len(pairs),
    )


def mean_metrics(parts: Sequence[PopeMetrics]) -> PopeMetrics:
    """Average the strategies with equal weight, as published tables do."""
    names = [field.name for field in fields(PopeMetrics)]
    return PopeMetrics(**{n: sum(getattr(p, n) for p in parts) / len(parts) for n in names})
