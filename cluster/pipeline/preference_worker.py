"""What the Ray Train worker of a preference reward model does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train.torch import get_device

from fgaif.config import Config
from fgaif.data.captions import ImageCaptions
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.model import load_lvlm, resolve_checkpoint
from fgaif.reward.inputs import load_reward_encoder
from fgaif.reward.preference import split_choices, train_preference
from fgaif.reward.preference_model import (
    PREFERENCE,
    PreferenceCard,
    PreferenceEncoder,
    new_preference_model,
    save_preference_model,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceTask:
    """What is to be trained: ``choices`` is an object reference, ``queue`` takes the progress."""

    choices: Any
    counts: dict[str, int]
    backbone_digest: str
    input_digest: str
    config: Config
    out_dir: Path
    queue: Any


def run_preference_task(task: PreferenceTask) -> None:
    """Train and save ``out_dir/preference``."""
    config, settings = task.config, task.config.reward
    torch.set_num_threads(config.cluster.threads)
    train, val = split_choices(
        ray.get(task.choices), val_fraction=settings.val_fraction, seed=config.seed
    )
    path = resolve_checkpoint(config.reward_backbone)
    policy = config.policy
    shared = load_reward_encoder(
        path,
        resolve_checkpoint(policy.model),
        max_image_pixels=config.data.max_image_pixels,
    )
    captions = None if settings.captions is None else ImageCaptions(settings.captions)
    encoder = PreferenceEncoder(shared, captions)
    backbone = load_lvlm(
        path, dtype=policy.dtype, device=str(get_device()), attention=policy.attention
    )
    if policy.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    features = FeatureCache(backbone, shared.encoder)
    model = new_preference_model(backbone, settings.lora, config.seed)
    result = train_preference(
        train,
        val,
        model,
        encoder,
        features,
        settings,
        seed=config.seed,
        report=lambda done, planned, figures: task.queue.put((PREFERENCE, done, planned, figures)),
    )
    card = PreferenceCard(
        backbone=str(path),
        backbone_digest=task.backbone_digest,
        captions=settings.captions,
        input_digest=task.input_digest,
        pairs=task.counts | {"train": len(train), "val": len(val)},
        metrics=result.metrics,
    )
    save_preference_model(task.out_dir / PREFERENCE, model, result.state, card)
