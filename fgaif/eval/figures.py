"""How figures are shown: names, meanings, and which way is better."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fgaif.kinds import words

ChangeVerdict = Literal["better", "worse", "same", ""]


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

    def verdict(self, before: float | None, after: float | None) -> ChangeVerdict:
        """Say whether the change is for the better; "same" below a tenth of a point or .01."""
        if before is None or after is None or not self.better:
            return ""
        delta = (after - before) * self.better
        if abs(delta) < (0.001 if self.share else 0.01):
            return "same"
        return "better" if delta > 0 else "worse"


ITEMS = Figure(
    key="items",
    title="items",
    meaning="Answers with so many sub-sentences",
    better=0,
    share=False,
)
OF_KIND = "KIND"
"""Key of a declaration that holds for every kind: these have their figures under their names."""
_RULES = ("official", "strict", "lenient")


def find_figure(figures: Sequence[Figure], name: str) -> Figure:
    """Find the declaration of a figure: by its whole name, else without the group, and last without
    the rule that it is read by; an undeclared one is a plain number."""
    parts = name.split("/")
    key = parts[-1]
    rule, _, rest = key.partition("_")
    names = ["/".join(parts[start:]) for start in range(len(parts))]
    names += [rest] if rule in _RULES else []
    by_key = {figure.key: figure for figure in (ITEMS, *figures)}
    known = next((by_key[name] for name in names if name in by_key), None)
    if known is None and OF_KIND in by_key:
        shared = by_key[OF_KIND]
        return replace(shared, key=key, title=shared.title.replace(OF_KIND, words(key)))
    return known or Figure(key=key, title=key.replace("_", " "), meaning="", better=0, share=False)


def group_of(name: str) -> str:
    """The part of the items that a figure is about (a split, a type, a length); empty for all."""
    group = name.rpartition("/")[0]
    word, _, bounds = group.partition("_")
    if word == "segments":
        return f"{bounds.replace('_', ' to ')} sub-sentences"
    return group.removeprefix("type/").replace("_", " ")


def title_of(figure: Figure, name: str) -> str:
    """Name a figure without its group, with the rule that it is read by."""
    key = name.rpartition("/")[2]
    rule = key.partition("_")[0]
    return f"{figure.title}, {rule}" if rule in _RULES and key != figure.key else figure.title
