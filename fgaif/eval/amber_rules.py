"""AMBER's rules: what one answer counts for, and the figures made of the sums."""

import numpy as np

from fgaif.eval.amber_files import AmberRow, AmberWords
from fgaif.eval.nouns import nouns_among
from fgaif.eval.scored import Stats, ratio
from fgaif.eval.yes_no import read_strictly
from fgaif.types import Json

DESCRIBED = (
    "responses", "hallucinating", "nouns", "hallucinated", "truth", "covered", "lures", "named",
    "words",
)  # fmt: skip
ASKED = (
    "questions", "true", "correct", "said", "hits",
    "lenient_correct", "lenient_said", "lenient_hits", "unreadable",
)  # fmt: skip
PARTS = ("existence", "attribute/state", "attribute/number", "attribute/action", "relation")
_GROUPS = {"": PARTS, "attribute/": PARTS[1:4], **{f"{part}/": (part,) for part in PARTS}}
_EPSILON = {"existence/": 1e-3}


def describe_stats(text: str, row: AmberRow, words: AmberWords) -> tuple[list[float], Json]:
    """Count for one description what is summed (``DESCRIBED``), and say for people what it names.

    A noun that only stands near a lure counts for Cog, and is hallucinated only if it is near no
    object of the image either, as in the script.
    """
    nouns = nouns_among(text, words.objects)
    covered: set[int] = set()
    named: set[int] = set()
    wrong: list[str] = []
    for noun in nouns:
        if noun in words.safe:
            continue
        found = words.closest(noun, row.truth, near=False)
        if found is None:
            lures = (words.closest(noun, row.hallu, near=near) for near in (False, True))
            named.update(lure for lure in lures if lure is not None)
            found = words.closest(noun, row.truth, near=True)
        if found is None:
            wrong.append(noun)
        else:
            covered.add(found)
    stats: list[float] = [
        1, bool(wrong), len(nouns), len(wrong), len(row.truth), len(covered), len(row.hallu),
        len(named), len(text.split()),
    ]  # fmt: skip
    return stats, {"named": nouns, "hallucinated": wrong, "shown": list(row.truth)}


def answer_stats(text: str, no: bool) -> list[float]:
    """Count for one answer what is summed (``ASKED``); ``no``: the right answer.

    The script takes exactly ``Yes`` and ``No``, and No is the positive class. The lenient rule
    reads the first word.
    """
    said, first = text == "No", read_strictly(text)
    correct = said if no else text == "Yes"
    lenient = first is False
    return [
        1, no, correct, said, said and no,
        first is not None and lenient == no, lenient, lenient and no, first is None,
    ]  # fmt: skip


def amber_figures(sums: Stats) -> dict[str, Stats]:
    """Compute all figures from sums (..., 9 + 5 * 9): ``DESCRIBED``, then ``ASKED`` of each part.

    ``official_f1`` is F1 as the script prints it: from precision and recall rounded to a tenth of a
    per cent, with a small number added to the denominator, and rounded itself.
    """
    columns = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
    d = dict(zip(DESCRIBED, columns[: len(DESCRIBED)], strict=True))
    asked = columns[len(DESCRIBED) :].reshape(len(PARTS), len(ASKED), *columns.shape[1:])
    chair = ratio(d["hallucinated"], d["nouns"])
    figures = {
        "generative/chair": chair,
        "generative/cover": ratio(d["covered"], d["truth"]),
        "generative/hal": ratio(d["hallucinating"], d["responses"]),
        "generative/cog": ratio(d["named"], d["lures"]),
        "generative/objects": ratio(d["nouns"], d["responses"]),
        "generative/length": ratio(d["words"], d["responses"]),
    }
    for group, parts in _GROUPS.items():
        own = sum((asked[PARTS.index(part)] for part in parts), np.zeros_like(asked[0]))
        figures |= {
            f"discriminative/{group}{name}": value
            for name, value in _answer_figures(own, _EPSILON.get(group, 1e-4)).items()
        }
    score = (1 - chair + figures["discriminative/f1"]) / 2
    return {"amber_score": score, **figures}


def _answer_figures(sums: Stats, epsilon: float) -> dict[str, Stats]:
    """Figures of one group of questions from sums (9, ...) of ``ASKED``; NaN without questions."""
    c = dict(zip(ASKED, sums, strict=True))
    figures: dict[str, Stats] = {}
    for rule in ("", "lenient_"):
        said, hits = c[f"{rule}said"], c[f"{rule}hits"]
        figures |= {
            f"{rule}accuracy": ratio(c[f"{rule}correct"], c["questions"]),
            f"{rule}precision": _or_zero(hits, said, c["questions"]),
            f"{rule}recall": _or_zero(hits, c["true"], c["questions"]),
            f"{rule}f1": _or_zero(2 * hits, said + c["true"], c["questions"]),
        }
    precision, recall = (np.round(100 * figures[name], 1) / 100 for name in ("precision", "recall"))
    f1 = 2 * precision * recall / (precision + recall + epsilon)
    return figures | {
        "official_f1": np.round(np.round(100 * f1, 1) / 100, 3),
        "no_ratio": ratio(c["said"], c["questions"]),
        "unreadable": ratio(c["unreadable"], c["questions"]),
    }


def _or_zero(numerator: Stats, denominator: Stats, questions: Stats) -> Stats:
    """The quotient; 0 without a denominator, as in the script; NaN where nothing was asked."""
    return np.where(questions > 0, np.nan_to_num(ratio(numerator, denominator)), np.nan)
