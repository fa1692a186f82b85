"""Long responses: a benchmark's figures by the number of sub-sentences of the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fgaif.eval.scored import FigureFunction, Scored, Stats
from fgaif.feedback.segment import split_offsets

BUCKETS = ((6, 15), (15, 20))
"""First and last number of sub-sentences, both included: the paper's test set and its longer one,
which share 15."""


def segment_count(text: str, min_words: int = 5) -> int:
    """Count the sub-sentences of a text; 0 of a blank one."""
    return len(split_offsets(text, min_words)) - 1 if text.strip() else 0


def with_buckets(
    scored: Scored, texts: Sequence[str], buckets: Sequence[tuple[int, int]] = BUCKETS
) -> Scored:
    """Add each figure over the answers of a bucket, as ``segments_6_15/NAME``.

    ``texts`` (N,) are the answers. The columns (N, D) become (N, (1 + buckets) D): first all items,
    then per bucket those that fall into it. ``segments_6_15/items`` is the number of answers.
    """
    counts = np.array([segment_count(text) for text in texts], dtype=np.int64)
    inside = [(low <= counts) & (counts <= high) for low, high in buckets]
    width = scored.stats.shape[1] + 1
    alone = np.column_stack([scored.stats, np.ones(len(counts))])
    columns = [alone] + [alone * rows[:, None] for rows in inside]
    return replace(
        scored,
        stats=np.concatenate(columns, axis=1),
        figures=_bucketed(scored.figures, width, buckets),
    )


def _bucketed(
    figures: FigureFunction, width: int, buckets: Sequence[tuple[int, int]]
) -> FigureFunction:
    def all_figures(sums: Stats) -> Mapping[str, Stats]:
        found = dict(figures(sums[..., : width - 1]))
        for index, (low, high) in enumerate(buckets, start=1):
            part = sums[..., index * width : (index + 1) * width]
            prefix = f"segments_{low}_{high}"
            found[f"{prefix}/items"] = part[..., -1]
            found |= {f"{prefix}/{k}": v for k, v in figures(part[..., :-1]).items()}
        return found

    return all_figures
