"""How the benchmarks' figures are shown: names, meanings, and which way is better."""

from fgaif.eval.compare import Figure
from fgaif.types import KINDS

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
