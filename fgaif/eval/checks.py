"""What makes a figure doubtful: checks of answers whose outcome stands beside the figures.

Each returns sentences, none where all is well. ``warned`` logs them; a ``Scored`` carries them into
JSON, tables and pages.
"""

import logging
import re
from collections.abc import Sequence

MANY_DISAGREE = 0.01
"""Share of the answers that two rules read differently from which on it is said."""
MANY_UNREAD = 0.05
"""Share of unreadable answers from which on it is said."""
_MANY_FOREIGN = 0.05
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


def _looks_english(text: str) -> bool:
    letters = _LETTER.findall(text)
    latin = sum(letter < "ɐ" for letter in letters)
    words = text.lower().split()
    return 3 * latin >= 2 * len(letters) and (len(words) < 8 or not _ENGLISH.isdisjoint(words))
