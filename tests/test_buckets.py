"""Figures by the number of sub-sentences, worked out by hand."""

import math

import numpy as np
import pytest

from fgaif.eval.buckets import segment_count, with_buckets
from fgaif.eval.scored import Scored, ratio
from fgaif.eval.uncertainty import intervals

PIECE = "There is a small red ball. "


def captions(*hallucinated: float) -> Scored:
    """Columns: hallucinated captions, captions."""
    ids = tuple(f"image{i}" for i in range(len(hallucinated)))
    return Scored(
        benchmark="chair",
        ids=ids,
        units=ids,
        stats=np.array([[h, 1.0] for h in hallucinated]),
        figures=lambda sums: {"chair_s": ratio(sums[..., 0], sums[..., 1])},
    )


@pytest.mark.parametrize(("text", "count"), [("", 0), (" \n", 0), (PIECE, 1), (PIECE * 7, 7)])
def test_pieces_are_those_of_the_method(text: str, count: int) -> None:
    assert segment_count(text) == count


def test_each_bucket_has_its_own_figures_and_15_counts_for_both() -> None:
    """Pieces 2, 6, 15, 15, 20, 21; hallucinated 1, 0, 1, 0, 1, 1: 1/3 of 6-15, 2/3 of 15-20."""
    texts = [PIECE * n for n in (2, 6, 15, 15, 20, 21)]
    found = with_buckets(captions(1, 0, 1, 0, 1, 1), texts).metrics()
    assert found == pytest.approx(
        {
            "chair_s": 4 / 6,
            "segments_6_15/items": 3,
            "segments_6_15/chair_s": 1 / 3,
            "segments_15_20/items": 3,
            "segments_15_20/chair_s": 2 / 3,
        }
    )


def test_an_empty_bucket_has_no_figures_but_says_so() -> None:
    found = with_buckets(captions(1, 0), [PIECE, PIECE]).metrics()
    assert found["segments_6_15/items"] == 0
    assert math.isnan(found["segments_6_15/chair_s"])


def test_buckets_get_intervals_like_any_figure() -> None:
    scored = with_buckets(captions(*[1, 0] * 20), [PIECE * n for n in (8, 8, 17, 17)] * 10)
    found = intervals(scored, resamples=200)["segments_6_15/chair_s"]
    assert found.value == 0.5
    assert found.low is not None
    assert found.low < 0.5
