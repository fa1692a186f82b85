"""Train a preference reward model (``reward.form=preference``) on Ray Train, in one worker."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ray
from ray.util.queue import Queue

from cluster.pipeline.keys import kind_of, leaf_keys
from cluster.pipeline.preference_worker import PreferenceTask
from cluster.pipeline.train_rewards import fit_in_ray_train, run_trainings
from fgaif.baselines.choices import Choices, choices_of_labels, read_choices
from fgaif.config import Config
from fgaif.data.captions import ImageCaptions
from fgaif.errors import DataError
from fgaif.lvlm.model import load_processor, resolve_checkpoint
from fgaif.reward.checkpoint import checkpoint_digest
from fgaif.reward.preference import Choice, split_choices
from fgaif.reward.preference_model import (
    PREFERENCE,
    PREFERENCE_CARD,
    PreferenceCard,
    read_preference_card,
)
from fgaif.types import LabeledResponse

Say = Callable[[str], None]


def open_choices(config: Config, labeled: Sequence[LabeledResponse]) -> Choices:
    """The pairs to learn from: of ``reward.pairs``, or of the labels; with captions for each.

    Raises:
        DataError: no pairs, or none with captions.
    """
    settings = config.reward
    if settings.pairs is not None:
        choices = read_choices(
            settings.pairs,
            load_processor(resolve_checkpoint(config.policy.model)).tokenizer,
            root=config.data.image_root,
            max_pixels=config.data.max_image_pixels,
        )
    else:
        choices = choices_of_labels(labeled, config.ppo.shape)
    if not choices.rows:
        raise DataError(
            f"preference reward model: no pairs: {choices.warning()}; sample several responses per "
            "prompt, for example feedback.samples_per_prompt=4, or give people's choices with "
            "reward.pairs=FILE"
        )
    if settings.captions is not None:
        ImageCaptions(settings.captions).require(one.better.prompt.image for one in choices.rows)
    return choices


def train_preference_model(
    config: Config, labeled: Sequence[LabeledResponse], out_dir: Path, progress: Callable[..., None]
) -> PreferenceCard:
    """Train and save ``out_dir/preference``; one that was made of equal inputs is kept.

    Raises:
        DataError: there is nothing to learn from.
        ActorError: the worker failed.
    """
    out_dir = out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    choices = open_choices(config, labeled)
    split_choices(choices.rows, val_fraction=config.reward.val_fraction, seed=config.seed)
    backbone = checkpoint_digest(resolve_checkpoint(config.reward_backbone))
    digest = choices_digest(choices.rows, config, backbone)
    folder = out_dir / PREFERENCE
    if (folder / PREFERENCE_CARD).is_file():
        card = read_preference_card(folder)
        if card.input_digest == digest:
            progress(PREFERENCE, 1, 1, card.metrics)
            return card

    def fits(queue: Queue) -> list[Callable[[], None]]:
        task = PreferenceTask(
            choices=ray.put(list(choices.rows)),
            counts=choices.counts(),
            backbone_digest=backbone,
            input_digest=digest,
            config=config,
            out_dir=out_dir,
            queue=queue,
        )
        return [partial(_fit, task)]

    run_trainings(config, fits, progress)
    return read_preference_card(folder)


def choices_digest(choices: Sequence[Choice], config: Config, backbone: str) -> str:
    """SHA-256 of everything that the model depends on, apart from how it is executed."""
    keys = [key for key in leaf_keys() if key.startswith("reward.")]
    counted = {
        key.split(".")[1] for key in keys if kind_of(config, "train-reward", key) == "result"
    }
    settings = config.reward.model_dump_json(include=counted - {"backbone", "pairs", "captions"})
    digest = hashlib.sha256(f"{settings} {config.seed} {config.policy.dtype} {backbone}".encode())
    captions = None if config.reward.captions is None else ImageCaptions(config.reward.captions)
    for choice in choices:
        image = choice.better.prompt.image
        told = None if captions is None else captions.of(image)
        digest.update(f"{image.sha256}{choice.better.prompt.text}{told}".encode())
        for response in (choice.better, choice.worse):
            digest.update(response.token_ids.tobytes())
    return digest.hexdigest()


def _fit(task: PreferenceTask) -> None:
    def train(settings: dict[str, PreferenceTask]) -> None:
        # Nested, so that it travels by value: see train_rewards.
        from cluster.pipeline.preference_worker import run_preference_task

        run_preference_task(settings["task"])

    fit_in_ray_train(train, task, task.config, task.out_dir, name=PREFERENCE, workers=1)
