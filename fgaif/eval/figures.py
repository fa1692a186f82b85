"""How figures are shown: names, meanings, and which way is better."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fgaif.kinds import words

ChangeVerdict = Literal["better", "worse", "unclear", ""]
NOT_KNOWN = "–"
"""Shown for a value that is not known."""


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
            return NOT_KNOWN
        return f"{100 * value:.1f} %" if self.share else f"{value:.2f}"

    def change(self, before: float | None, after: float | None) -> str:
        """Format the change: points or units, and for errors how much of them is left."""
        if before is None or after is None:
            return ""
        delta = after - before
        text = f"{100 * delta:+.1f} pt" if self.share else f"{delta:+.2f}"
        text = text.replace("-", "−")
        return f"{text} (×{after / before:.2f})" if self.better < 0 and before > 0 else text

    def show_range(self, low: float | None, high: float | None, sign: str = "") -> str:
        """Format the ends of an interval as ``[low, high]``; empty where there is none."""
        if low is None or high is None:
            return ""
        ends = (
            f"{100 * end if self.share else end:{sign}.{1 if self.share else 2}f}"
            for end in (low, high)
        )
        return f"[{', '.join(ends)}]".replace("-", "−")

    def verdict(self, low: float | None, high: float | None) -> ChangeVerdict:
        """Say by the interval of a change whether it is for the better; "unclear" where the
        interval holds zero, nothing where there is none or no side is the better one."""
        if low is None or high is None or not self.better:
            return ""
        if low <= 0 <= high:
            return "unclear"
        return "better" if low * self.better > 0 else "worse"


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
