"""Train Fact-RLHF's reward model on pairs of answers (arXiv 2309.14525)."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fgaif.config import RewardConfig
from fgaif.errors import DataError
from fgaif.lvlm.features import FeatureCache
from fgaif.reward.dataset import plan_batches
from fgaif.reward.model import RewardModel, trainable_state
from fgaif.reward.preference_model import PreferenceEncoder, answer_rewards
from fgaif.reward.train import make_optimizer, planned_steps
from fgaif.types import Response

CENTER = 1e-3
"""Weight of the term that keeps the mean of the rewards at zero, which pairs leave open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Two answers to one prompt, and which is better."""

    better: Response
    worse: Response


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPreference:
    """The best state by validation loss, and its figures."""

    state: dict[str, Tensor]
    metrics: dict[str, float]


def preference_loss(better: Tensor, worse: Tensor, center: float = CENTER) -> Tensor:
    """Bradley-Terry with a small mean-squared term, of rewards (N,) and (N,).

        mean(-log sigmoid(r_better - r_worse)) + center * mean((r_better + r_worse)^2)

    The second term fixes the zero of the rewards (LLaVA-RLHF has 1e-3 |mean(r_1 + r_0)|; the
    square is Eisenstein et al., arXiv 2312.09244).
    """
    return -logsigmoid(better - worse).mean() + center * (better + worse).square().mean()


def split_choices(
    choices: Sequence[Choice], *, val_fraction: float, seed: int
) -> tuple[list[Choice], list[Choice]]:
    """Hold out whole images, ordered by a hash of seed and content.

    Raises:
        DataError: fewer than two images.
    """
    images = sorted(
        {choice.better.prompt.image.sha256 for choice in choices},
        key=lambda sha: hashlib.sha256(f"{seed}:{sha}".encode()).digest(),
    )
    if len(images) < 2:
        raise DataError(
            f"preference reward model: {len(choices)} pairs show {len(images)} image(s); at least "
            "2 are needed to train and to validate: annotate more prompts (data.feedback_prompts)"
        )
    held_out = set(images[: min(math.ceil(val_fraction * len(images)), len(images) - 1)])
    train = [one for one in choices if one.better.prompt.image.sha256 not in held_out]
    return train, [one for one in choices if one.better.prompt.image.sha256 in held_out]


def train_preference(
    train: Sequence[Choice],
    val: Sequence[Choice],
    model: RewardModel,
    encoder: PreferenceEncoder,
    features: FeatureCache,
    config: RewardConfig,
    *,
    seed: int,
    report: Callable[[int, int, dict[str, float]], None] = lambda *_: None,
) -> TrainedPreference:
    """Train until the planned steps are done or validation stops improving, in this process.

    Raises:
        DataError: no validation gave a finite loss.
    """
    steps = planned_steps(len(train), config)
    optimizer, schedule = make_optimizer(model, config, steps)
    lengths = [len(one.better.token_ids) + len(one.worse.token_ids) for one in train]
    every = max(1, math.ceil(steps / config.evals))
    best: TrainedPreference | None = None
    best_loss, stale = math.inf, 0
    batches = plan_batches(lengths, batch_size=config.batch_size, steps=steps, seed=seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for done, batch in enumerate(batches, start=1):
        model.train()
        loss = 0.0
        for start in range(0, len(batch), config.micro_batch):
            part = [train[index] for index in batch[start : start + config.micro_batch]]
            share = _loss(part, model, encoder, features) * (len(part) / len(batch))
            share.backward()
            loss += float(share.detach())
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if done % every and done != steps:
            report(done, steps, {"loss": loss})
            continue
        metrics = validate(val, model, encoder, features, config.micro_batch)
        report(done, steps, {"loss": loss, **metrics})
        if metrics["val_loss"] < best_loss:  # not true of NaN
            best_loss, stale = metrics["val_loss"], 0
            best = TrainedPreference(
                state=trainable_state(model), metrics=metrics | {"steps": float(done)}
            )
            continue
        stale += 1
        if stale >= config.patience:
            break
    if best is None:
        raise DataError(
            f"preference reward model: no validation gave a finite loss; lower reward.lr "
            f"({config.lr})"
        )
    return best


@torch.no_grad()
def validate(
    choices: Sequence[Choice],
    model: RewardModel,
    encoder: PreferenceEncoder,
    features: FeatureCache,
    micro_batch: int,
) -> dict[str, float]:
    """Loss, and the share of pairs that are put in order."""
    model.eval()
    better, worse = (
        torch.cat(
            [
                answer_rewards(model, encoder, features, texts[at : at + micro_batch]).cpu()
                for at in range(0, len(texts), micro_batch)
            ]
        )
        for texts in ([one.better for one in choices], [one.worse for one in choices])
    )
    return {
        "val_loss": float(preference_loss(better, worse)),
        "accuracy": float((better > worse).float().mean()),
        "mean_reward": float((better + worse).mean() / 2),
        "margin": float((better - worse).mean()),
    }


def _loss(
    part: Sequence[Choice], model: RewardModel, encoder: PreferenceEncoder, features: FeatureCache
) -> Tensor:
    both = [one.better for one in part] + [one.worse for one in part]
    rewards = answer_rewards(model, encoder, features, both)
    return preference_loss(*rewards.chunk(2))
