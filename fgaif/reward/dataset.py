"""What a reward model is trained on: usable rows, the split by image, class weights, batches."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fgaif.config import Config, NoiseConfig
from fgaif.errors import DataError
from fgaif.reward.label_noise import Flips, flip_rows
from fgaif.types import UNKNOWN, FloatArray, IntArray, Kind, LabeledResponse, SegmentClass

_WINDOW = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardData:
    """Responses of one kind with at least one judged segment, split by image."""

    kind: Kind
    train: tuple[LabeledResponse, ...]
    val: tuple[LabeledResponse, ...]
    unknown_segments: int
    """Segments left out because a verdict is missing."""
    unused_responses: int
    """Responses left out because no segment is judged."""
    flips: Flips | None = None
    """Labels made wrong on purpose, where there is noise."""

    def labels(self, row: LabeledResponse) -> IntArray:
        """Classes (S,) of a row's segments, or UNKNOWN."""
        return row.of_kind(self.kind)


def read_data(kind: Kind, rows: Sequence[LabeledResponse], config: Config) -> RewardData:
    """What a reward model is trained on, with the label noise configured for its kind.

    Raises:
        DataError: as :func:`prepare_data`.
    """
    settings = config.reward
    return prepare_data(
        kind,
        rows,
        val_fraction=settings.val_fraction,
        seed=config.seed,
        noise=settings.noise.get(kind),
        noise_seed=settings.noise_seed,
    )


def prepare_data(
    kind: Kind,
    rows: Sequence[LabeledResponse],
    *,
    val_fraction: float,
    seed: int,
    noise: NoiseConfig | None = None,
    noise_seed: int = 0,
) -> RewardData:
    """Select the rows that a kind can learn from and hold out whole images.

    Images are ordered by a hash of seed and content, so the split depends on nothing else. Label
    noise hits the images held out too, as errors of the feedback do.

    Raises:
        DataError: fewer than two images have a judged segment.
    """
    flips = None
    if noise is not None:
        rows, flips = flip_rows(rows, kind, noise, noise_seed)
    labels = [row.of_kind(kind) for row in rows]
    usable = [row for row, y in zip(rows, labels, strict=True) if (y != UNKNOWN).any()]
    images = sorted(
        {row.response.prompt.image.sha256 for row in usable},
        key=lambda sha: hashlib.sha256(f"{seed}:{sha}".encode()).digest(),
    )
    if len(images) < 2:
        raise DataError(
            f"reward model {kind}: {len(rows)} labelled responses show {len(images)} image(s) "
            "with a judged segment; at least 2 are needed to train and to validate"
        )
    held_out = set(images[: min(math.ceil(val_fraction * len(images)), len(images) - 1)])
    in_val = [row.response.prompt.image.sha256 in held_out for row in usable]
    return RewardData(
        kind=kind,
        train=tuple(row for row, out in zip(usable, in_val, strict=True) if not out),
        val=tuple(row for row, out in zip(usable, in_val, strict=True) if out),
        unknown_segments=sum(int((y == UNKNOWN).sum()) for y in labels),
        unused_responses=len(rows) - len(usable),
        flips=flips,
    )


def class_weights(labels: IntArray, *, balance: bool) -> FloatArray:
    """Weights (C,) with a mean of 1 over the labels (N,): w_c proportional to n_c ** -1/2.

    A class that does not occur weighs 0; without ``balance`` every class weighs 1.
    """
    if not balance:
        return np.ones(len(SegmentClass), dtype=np.float32)
    counts = np.bincount(labels[labels != UNKNOWN], minlength=len(SegmentClass)).astype(float)
    weights = np.divide(1.0, np.sqrt(counts), out=np.zeros_like(counts), where=counts > 0)
    return (weights * counts.sum() / (weights * counts).sum()).astype(np.float32)


def plan_batches(
    lengths: Sequence[int], *, batch_size: int, steps: int, seed: int
) -> list[IntArray]:
    """Row indexes (batch_size,) of every step, each sorted by length.

    Epochs are fresh permutations, cut without a rest. Within a window of 8 batches rows of similar
    length meet, then the window's batches are shuffled: little padding, and no order by length.
    """
    rng = np.random.default_rng(seed)
    total, stream = steps * batch_size, np.zeros(0, dtype=np.int64)
    while len(stream) < total:
        stream = np.concatenate([stream, rng.permutation(len(lengths))])
    sizes = np.asarray(lengths)
    batches: list[IntArray] = []
    for start in range(0, total, _WINDOW * batch_size):
        window = stream[start : min(start + _WINDOW * batch_size, total)]
        window = window[np.argsort(sizes[window], kind="stable")]
        parts = window.reshape(-1, batch_size)
        batches += list(parts[rng.permutation(len(parts))])
    return batches
