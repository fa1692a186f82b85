"""Train one reward model: loss, schedule, early stopping. Who steps is left to an engine.

Cross entropy over the separators of a batch, as in the reference; added to it: class weights, a
held-out split by image, the best state kept by validation loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fgaif.config import RewardConfig
from fgaif.errors import DataError
from fgaif.lvlm.families.base import ImageFeatures
from fgaif.lvlm.features import FeatureCache
from fgaif.reward.dataset import RewardData, class_weights, plan_batches
from fgaif.reward.inputs import RewardEncoder
from fgaif.reward.metrics import RewardMetrics, reward_metrics
from fgaif.reward.model import RewardModel, segment_probs
from fgaif.types import UNKNOWN, FloatArray, IntArray, LabeledResponse

Report = Callable[[int, int, dict[str, float]], None]
"""Told the steps done, the steps planned and figures; ``val_loss`` is there after a validation."""


class Engine(Protocol):
    """Steps a reward model's trainable parameters; DeepSpeed in production.

    The loss given to ``backward`` is a rank's own: gradients are summed over its calls until
    ``step``, and averaged over the ranks.
    """

    rank: int
    world_size: int

    def __call__(self, input_ids: Tensor, features: ImageFeatures, separators: Tensor) -> Tensor:
        """Logits (N, C), with a graph."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``; ``last`` says that a step follows."""
        ...

    def step(self) -> None:
        """Clip, update, advance the learning rate, clear gradients."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Copy the trainable parameters to the CPU, whole, by name. Every rank calls it."""
        ...

    def agree(self, value: float) -> float:
        """Rank 0's value, so that every rank takes the same decision."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedReward:
    """The best state by validation loss, its figures, and how long training went on."""

    state: dict[str, Tensor]
    metrics: RewardMetrics
    val_loss: float
    steps: int
    planned_steps: int


def planned_steps(rows: int, config: RewardConfig) -> int:
    """Optimiser steps of the configured epochs, at least one."""
    return max(1, round(config.epochs * rows / config.batch_size))


def make_optimizer(model: RewardModel, config: RewardConfig, steps: int) -> tuple[AdamW, LambdaLR]:
    """AdamW over the trainable parameters; linear warm-up, then a cosine to zero."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay)
    return optimizer, LambdaLR(optimizer, lambda step: lr_factor(step, steps, config.warmup))


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate of step 0 .. steps - 1: (step + 1) / rise, then a half cosine."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train_reward_model(
    data: RewardData,
    model: RewardModel,
    engine: Engine,
    encoder: RewardEncoder,
    features: FeatureCache,
    config: RewardConfig,
    *,
    seed: int,
    report: Report,
) -> TrainedReward:
    """Train until the planned steps are done or validation stops improving.

    Every rank calls this with the same arguments and takes its share of each batch; every rank
    validates on all held-out rows, so that all hold the same figures.
    """
    trainer = _Trainer(data, model, engine, encoder, features, config)
    steps = planned_steps(len(data.train), config)
    every = max(1, math.ceil(steps / config.evals))
    lengths = [len(row.response.token_ids) for row in data.train]
    best: TrainedReward | None = None
    stale = 0
    batches = plan_batches(lengths, batch_size=config.batch_size, steps=steps, seed=seed)
    for done, batch in enumerate(batches, start=1):
        loss = trainer.step([data.train[index] for index in batch])
        if done % every and done != steps:
            report(done, steps, {"loss": loss})
            continue
        val_loss, metrics = trainer.validate()
        report(done, steps, {"loss": loss, "val_loss": val_loss, **metrics.as_floats()})
        if val_loss < (best.val_loss if best else math.inf):  # not true of NaN
            best, stale = TrainedReward(
                state=engine.state(), metrics=metrics, val_loss=val_loss,
                steps=done, planned_steps=steps,
            ), 0  # fmt: skip
            continue
        stale += 1
        if stale >= config.patience:
            break
    if best is None:
        raise DataError(
            f"reward model {data.kind}: no validation gave a finite loss; lower reward.lr "
            f"({config.lr})"
        )
    return best


class _Trainer:
    """What a step and a validation share."""

    def __init__(
        self,
        data: RewardData,
        model: RewardModel,
        engine: Engine,
        encoder: RewardEncoder,
        features: FeatureCache,
        config: RewardConfig,
    ) -> None:
        self._data, self._model, self._engine = data, model, engine
        self._encoder, self._features, self._config = encoder, features, config
        self._device = next(model.parameters()).device
        labels = np.concatenate([data.labels(row) for row in data.train])
        self._weights = class_weights(labels, balance=config.class_balance)

    def step(self, rows: Sequence[LabeledResponse]) -> float:
        """One optimiser step on rows sorted by length; returns this rank's mean loss.

        loss = sum_n w_n CE_n / sum_n w_n over the separators of the whole batch, whatever the
        number of ranks and of forward passes: each rank sums its part and multiplies by the number
        of ranks, because the engine averages over them.
        """
        engine, share = self._engine, self._config.batch_size // self._engine.world_size
        parts = engine.world_size * math.ceil(share / self._config.micro_batch)
        cuts = np.array_split(np.arange(len(rows)), parts)[engine.rank :: engine.world_size]
        total = float(self._weights_of(self._labels(rows)).sum())
        self._model.train()
        losses = []
        for index, cut in enumerate(cuts):
            mine = [rows[i] for i in cut]
            labels = torch.from_numpy(self._labels(mine)).to(self._device)
            batch = self._encoder.encode(
                [row.response for row in mine], [row.segments for row in mine], self._device
            )
            pictures = self._features([row.response.prompt.image for row in mine])
            logits = engine(batch.input_ids, pictures, batch.separators)
            weights = torch.from_numpy(self._weights).to(self._device)
            loss = cross_entropy(logits, labels, weights, ignore_index=UNKNOWN, reduction="sum") * (
                engine.world_size / total
            )
            engine.backward(loss, last=index == len(cuts) - 1)
            losses.append(loss.detach())
        engine.step()
        return float(torch.stack(losses).sum())

    def validate(self) -> tuple[float, RewardMetrics]:
        """Weighted loss and figures on the held-out rows."""
        self._model.eval()
        rows = self._data.val
        probs = segment_probs(
            self._model, self._encoder, self._features,
            [row.response for row in rows], [row.segments for row in rows],
            micro_batch=self._config.micro_batch, device=self._device,
        )  # fmt: skip
        p, y = np.concatenate(probs), self._labels(rows)
        p, y = p[y != UNKNOWN], y[y != UNKNOWN]
        weights = self._weights_of(y)
        nll = -np.log(np.maximum(p[np.arange(len(y)), y], np.finfo(np.float32).tiny))
        loss = float((weights * nll).sum() / max(float(weights.sum()), 1e-12))
        return self._engine.agree(loss), reward_metrics(p, y)

    def _labels(self, rows: Sequence[LabeledResponse]) -> IntArray:
        return np.concatenate([self._data.labels(row) for row in rows])

    def _weights_of(self, labels: IntArray) -> FloatArray:
        return np.where(labels == UNKNOWN, np.float32(0), self._weights[labels])
