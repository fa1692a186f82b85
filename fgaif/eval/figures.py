"""How figures are shown: names, meanings, and which way is better."""

from dataclasses import dataclass
from typing import Literal

from fgaif.types import KINDS

Verdict = Literal["better", "worse", "same", ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """How a figure is shown. ``better``: -1 when lower is better, 1 when higher is, 0 neither."""

    key: str
    title: str
    meaning: str
    better: Literal[-1, 0, 1]
    share: bool = True

    def show(self, value: float | None) -> str:
        """Format a value: shares as per cent, a dash where it is not known."""
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if self.share else f"{value:.2f}"

    def change(self, before: float | None, after: float | None) -> str:
        """Format the change: points or units, and for errors how much of them is left."""
        if before is None or after is None:
            return ""
        delta = after - before
        text = f"{100 * delta:+.1f} pt" if self.share else f"{delta:+.2f}"
        text = text.replace("-", "−")
        return f"{text} (×{after / before:.2f})" if self.better < 0 and before > 0 else text

    def verdict(self, before: float | None, after: float | None) -> Verdict:
        """Say whether the change is for the better; "same" below a tenth of a point or .01."""
        if before is None or after is None or not self.better:
            return ""
        delta = (after - before) * self.better
        if abs(delta) < (0.001 if self.share else 0.01):
            return "same"
        return "better" if delta > 0 else "worse"


_RELATIVE = "100 x mean grade / mean grade of the reference answers"
_FIGURES = (
    Figure(key="accuracy", title="accuracy", meaning="Questions answered right", better=1),
    Figure(key="precision", title="precision", meaning="Yes answers that are right", better=1),
    Figure(key="recall", title="recall", meaning="Objects of the image that are named", better=1),
    Figure(key="f1", title="F1", meaning="Harmonic mean of precision and recall", better=1),
    Figure(key="yes_ratio", title="yes ratio", meaning="Questions answered yes", better=0),
    Figure(
        key="strict_unreadable",
        title="unreadable",
        meaning="Answers that begin with neither yes nor no",
        better=-1,
    ),
    Figure(
        key="chair_i",
        title="CHAIR_i",
        meaning="Object mentions that the image does not show",
        better=-1,
    ),
    Figure(
        key="chair_s",
        title="CHAIR_s",
        meaning="Captions that name an object which the image does not show",
        better=-1,
    ),
    Figure(key="score", title="score", meaning="Mean rating, 0 to 6", better=1, share=False),
    Figure(
        key="hallucination_rate",
        title="hallucination rate",
        meaning="Answers that the judge rates below 3",
        better=-1,
    ),
    Figure(key="all", title="relative score", meaning=_RELATIVE, better=1, share=False),
    Figure(key="conv", title="conversation", meaning=_RELATIVE, better=1, share=False),
    Figure(key="detail", title="detail", meaning=_RELATIVE, better=1, share=False),
    Figure(key="complex", title="complex reasoning", meaning=_RELATIVE, better=1, share=False),
    Figure(
        key="faithscore",
        title="FaithScore",
        meaning="Mean share of an answer's atomic facts that the image bears out",
        better=1,
    ),
    Figure(
        key="faithscore_s",
        title="FaithScore by sentence",
        meaning="Mean share of an answer's descriptive sub-sentences without a wrong fact",
        better=1,
    ),
    *(
        Figure(key=kind, title=f"{kind} facts", meaning="Facts that the image bears out", better=1)
        for kind in KINDS
    ),
)
_BY_KEY = {figure.key: figure for figure in _FIGURES}
_RULES = ("official", "strict")


def figure_of(name: str) -> Figure:
    """Look a figure up by the last part of its name; an unknown one is a plain number."""
    key = name.rpartition("/")[2]
    rule, _, rest = key.partition("_")
    known = _BY_KEY.get(key) or (_BY_KEY.get(rest) if rule in _RULES else None)
    plain = Figure(key=key, title=key.replace("_", " "), meaning="", better=0, share=False)
    return known or plain


def group_of(name: str) -> str:
    """The part of the items that a figure is about (a split, a type, a length); empty for all."""
    group = name.rpartition("/")[0]
    word, _, bounds = group.partition("_")
    if word == "segments":
        return f"{bounds.replace('_', ' to ')} sub-sentences"
    return group.removeprefix("type/").replace("_", " ")


def title_of(name: str) -> str:
    """Name a figure without its group, with the rule that it is read by."""
    key = name.rpartition("/")[2]
    figure = figure_of(name)
    rule = key.partition("_")[0]
    return f"{figure.title}, {rule}" if rule in _RULES and key != figure.key else figure.title
