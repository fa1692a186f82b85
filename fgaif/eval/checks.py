"""What makes a figure doubtful: checks of answers whose outcome stands beside the figures.

Each returns sentences, none where all is well. ``warned`` logs them; a ``Scored`` carries them into
JSON, tables and pages.
"""

import logging
import re
import unicodedata
from collections.abc import Sequence

from fgaif.eval.scored import Scored

MANY_DISAGREE = 0.01
"""Share of the answers that two rules read differently from which on it is said."""
MANY_UNREAD = 0.05
"""Share of unreadable answers from which on it is said."""
_MANY_FOREIGN = 0.05
_LEFT_OUT = {
    ("judge_unreadable", "judge_no_reply"): "judgements failed and are left out: the figures are "
    "over the others; see the judge and its limits",
    ("answers_unlabelled", "answers_unextracted", "answers_unverified", "answers_unmatched"): (
        "answers are left out because a stage failed; see the judge and its limits"
    ),
    ("answers_without_question", "captions_without_truth", "answers_without_truth"): (
        "answers fit nothing that is asked; see that both files are of the same set"
    ),
    ("images_unusable",): "questions are left out because their images cannot be used",
}
_UNSPLIT = frozenset(("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "ETHIOPIC", "ARMENIAN"))
_LETTER = re.compile(r"[^\W\d_]")
_ENGLISH = frozenset(("a", "an", "the", "is", "are", "in", "on", "of", "and", "with", "to", "at"))


def warned(log: logging.Logger, *checks: Sequence[str]) -> tuple[str, ...]:
    """Log the sentences of several checks and return them."""
    sentences = tuple(sentence for check in checks for sentence in check)
    for sentence in sentences:
        log.warning("%s", sentence)
    return sentences


def language_check(benchmark: str, texts: Sequence[str], needs: str) -> list[str]:
    """Say how many texts are not English as far as one can see; ``needs`` is what needs English.

    A text counts if more than a third of its letters are not Latin, or if it has eight words or
    more and not one of the commonest English ones.
    """
    foreign = [text for text in texts if not _looks_english(text)]
    if not texts or len(foreign) <= _MANY_FOREIGN * len(texts):
        return []
    return [
        f"{benchmark}: {len(foreign)} of {len(texts)} texts do not look English, as "
        f"{foreign[0]!r:.80}; {needs} know English only, so that what these texts say is not seen"
    ]


def general_checks(scored: Scored, *, descriptions: bool) -> list[str]:
    """What can be said of any benchmark's outcome.

    Judgements that failed, answers that fit nothing, images that cannot be used; of
    ``descriptions`` whether the splitter knows their script.
    """
    name, counts, total = scored.benchmark, scored.counts, len(scored.ids)
    found = []
    for reasons, said in _LEFT_OUT.items():
        lost = sum(counts.get(reason, 0) for reason in reasons)
        if lost > MANY_UNREAD * (total + lost):
            found.append(f"{name}: {lost} of {total + lost} {said}")
    texts = [item["answer"] for item in scored.items] if descriptions else []
    unknown = [text for text in texts if _script(text) in _UNSPLIT]
    if unknown and len(unknown) > _MANY_FOREIGN * len(texts):
        found.append(
            f"{name}: {len(unknown)} of {len(texts)} answers are in a script whose ends of "
            f"sentences the splitter does not know ({_script(unknown[0]).lower()}), as "
            f"{unknown[0]!r:.60}; each may be one single sub-sentence"
        )
    return found


def _script(text: str) -> str:
    """The Unicode name of the script of a text's middle letter; empty without letters."""
    letters = _LETTER.findall(text)
    return unicodedata.name(letters[len(letters) // 2], "").partition(" ")[0] if letters else ""


def _looks_english(text: str) -> bool:
    letters = _LETTER.findall(text)
    latin = sum(letter < "ɐ" for letter in letters)
    words = text.lower().split()
    return 3 * latin >= 2 * len(letters) and (len(words) < 8 or not _ENGLISH.isdisjoint(words))
