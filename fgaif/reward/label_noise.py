"""Label noise for studies: wrong labels at set rates, drawn anew from the clean ones at reading."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fgaif.config import NoiseConfig
from fgaif.types import IntArray, Kind, LabeledResponse, SegmentClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """How many labels of a kind were made wrong, of those that could be."""

    ok_to_hallu: int = 0
    hallu_to_ok: int = 0
    ok: int = 0
    hallu: int = 0


def flip_labels(
    labels: IntArray, kind: Kind, response_id: str, noise: NoiseConfig, seed: int
) -> IntArray:
    """Flip labels (S,) of one kind: OK to HALLU and HALLU to OK, each with its own probability.

    Segment s is flipped if u < rate, with u in [0, 1) from a hash of (seed, kind, response id, s):
    other rows and their order do not matter, kinds are flipped independently, and a higher rate
    flips what a lower one flips and more. NONE and UNKNOWN stay.
    """
    rates = np.zeros(len(labels))
    rates[labels == SegmentClass.OK] = noise.rate_ok_to_hallu
    rates[labels == SegmentClass.HALLU] = noise.rate_hallu_to_ok
    draws = [_uniform(f"{seed}\n{kind}\n{response_id}\n{index}") for index in range(len(labels))]
    other = np.where(labels == SegmentClass.OK, SegmentClass.HALLU, SegmentClass.OK)
    return np.where(np.array(draws) < rates, other, labels).astype(np.int64)


def flip_rows(
    rows: Sequence[LabeledResponse], kind: Kind, noise: NoiseConfig, seed: int
) -> tuple[list[LabeledResponse], Flips]:
    """Flip the labels of one kind in all rows, which stay as they are, and count the flips."""
    noisy, before, after = [], [], []
    for row in rows:
        clean = row.of_kind(kind)
        flipped = flip_labels(clean, kind, row.response.id, noise, seed)
        labels = row.labels.copy()
        labels[:, row.kinds.index(kind)] = flipped
        noisy.append(replace(row, labels=labels))
        before.append(clean)
        after.append(flipped)
    was, now = (np.concatenate([np.zeros(0, dtype=np.int64), *part]) for part in (before, after))
    ok, hallu = was == SegmentClass.OK, was == SegmentClass.HALLU
    flips = Flips(
        ok_to_hallu=int((ok & (was != now)).sum()),
        hallu_to_ok=int((hallu & (was != now)).sum()),
        ok=int(ok.sum()),
        hallu=int(hallu.sum()),
    )
    return noisy, flips


def _uniform(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56
