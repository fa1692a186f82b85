"""What a step's rollouts look like, as scalars; names are explained in ``fgaif.tracking``."""

from collections.abc import Mapping, Sequence
from math import isfinite

import numpy as np

from fgaif.errors import DivergedError
from fgaif.ppo.batch import pad
from fgaif.ppo.kl import kl_k1, mismatch
from fgaif.reward.dense import DenseRewards
from fgaif.types import Segment, SegmentClass, SegmentScores, TrainBatch


def rollout_metrics(
    batch: TrainBatch,
    segments: Sequence[Sequence[Segment]],
    scores: Sequence[SegmentScores],
    rewards: DenseRewards,
    kl_coef: float,
) -> dict[str, float]:
    """Reward and hallucinated share per kind, KL, lengths, penalties, engine mismatch.

    The hallucinated share of a kind counts the segments whose most likely class is not NONE, by
    the reward models; it is missing for a kind without such segments in the batch.
    """
    count = len(batch.responses)
    kl = kl_k1(batch.old_logprobs, batch.reference_logprobs, batch.mask)
    rollout_logprobs = pad([response.rollout_logprobs for response in batch.responses])
    gap = mismatch(rollout_logprobs, batch.old_logprobs, batch.mask)
    penalised = [cost > 0 for costs in rewards.penalties for cost in costs]
    metrics = {
        "reward/task": float(batch.task_rewards.sum() / count),
        "reward/total": float(batch.rewards.sum() / count),
        "kl/response": float(kl.sum() / count),
        "kl/token": float(kl.sum() / batch.mask.sum()),
        "kl/coef": kl_coef,
        "length/tokens": float(batch.mask.sum() / count),
        "length/segments": sum(map(len, segments)) / count,
        "length/truncated": sum(r.finish == "length" for r in batch.responses) / count,
        "segments/penalised": float(np.mean(penalised)) if penalised else 0.0,
        "mismatch/mean": gap.mean_dp,
        "mismatch/max": gap.max_dlogp,
    }
    return metrics | _per_kind(scores, rewards)


def _per_kind(scores: Sequence[SegmentScores], rewards: DenseRewards) -> dict[str, float]:
    classes = np.concatenate([score.probs.argmax(axis=2) for score in scores])
    metrics: dict[str, float] = {}
    for index, kind in enumerate(rewards.centers.kinds):
        values = sum(float(value[:, index].sum()) for value in rewards.values)
        metrics[f"reward/{kind}"] = values / len(scores)
        judged = classes[:, index][classes[:, index] != SegmentClass.NONE]
        if judged.size:
            metrics[f"hallu/{kind}"] = float((judged == SegmentClass.HALLU).mean())
    return metrics


def require_finite(step: int, figures: Mapping[str, float], key: str, lr: float) -> None:
    """Stop a training whose losses or gradients are no numbers any more.

    Args:
        step: PPO step, from 1.
        figures: of the step's update, by name.
        key: of the learning rate that it was made with, ``lr``.

    Raises:
        DivergedError: names the figures that are not finite.
    """
    bad = ", ".join(f"{name} = {value}" for name, value in figures.items() if not isfinite(value))
    if bad:
        raise DivergedError(
            f"PPO step {step}: not finite: {bad}; lower {key} = {lr} and train anew, without "
            "ppo.resume: this training is moved aside, not removed"
        )
