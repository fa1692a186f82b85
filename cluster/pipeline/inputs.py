"""The inputs of all stages, looked at before the first starts: a mistake in the last one's costs
no hours.

Looked at are the first rows of files with their columns and images, checkpoints, prompts, keys of
endpoints and the free disk; images of later rows are checked when the stage reads them.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from cluster.pipeline.evaluate import verifier_judges
from cluster.pipeline.keys import Stage
from fgaif.chat.limits import check_prices
from fgaif.chat.secrets import read_key
from fgaif.config import API, Config
from fgaif.data.captions import ImageCaptions
from fgaif.data.prompts import look_at_prompts
from fgaif.data.sources import QUESTIONS, require_questions
from fgaif.errors import DataError, FgaifError
from fgaif.feedback.external import look_at_responses
from fgaif.feedback.models import check_prompts
from fgaif.lvlm.checkpoint_files import read_json
from fgaif.lvlm.families import family_of_type
from fgaif.lvlm.families.base import Family, require_served_adapters
from fgaif.lvlm.model import check_head, load_processor, resolve_checkpoint

_LEAST_FREE = 256 * 2**20
"""Bytes; results, logs and stores of the smallest run fit."""

Look = Callable[[], object]
"""Looks at an input; raises FgaifError for one that cannot be used."""


def refuse_inputs(wrong: Mapping[str, FgaifError]) -> None:
    """Refuse what :func:`wrong_inputs` found, if it found anything.

    Raises:
        FgaifError: like the first; a line for each key, with what is wrong and what to do.
    """
    if wrong:
        kind = type(next(iter(wrong.values())))
        raise kind("\n".join(f"{key}: {error}" for key, error in wrong.items()))


def wrong_inputs(config: Config, stages: Sequence[Stage]) -> dict[str, FgaifError]:
    """What is wrong with inputs of the stages, by configuration key."""
    looks: dict[str, Look] = {}
    for stage in stages:
        looks |= _looks(config, stage)
    wrong: dict[str, FgaifError] = {}
    for key, look in looks.items():
        try:
            look()
        except FgaifError as error:
            wrong[key] = error
    return wrong


def _looks(config: Config, stage: Stage) -> dict[str, Look]:
    data, feedback, anchor = config.data, config.feedback, config.ppo.anchor
    rows = partial(look_at_prompts, root=data.image_root, max_pixels=data.max_image_pixels)
    policy: dict[str, Look] = {
        "policy.model": partial(_look_at_policy, config),
        "dir": partial(_require_room, config.run_dir),
    }
    train: dict[str, Look] = {"data.train": partial(rows, data.train)}
    if stage == "sample" and data.responses is not None:
        return policy | {
            "data.responses": partial(
                look_at_responses,
                data.responses,
                root=data.image_root,
                max_pixels=data.max_image_pixels,
            )
        }
    if stage == "sample":
        return policy | train
    if stage == "annotate":
        return policy | _models(config, feedback.extractor, *feedback.verifiers)
    if stage == "train-reward":
        backbone: dict[str, Look] = {
            "reward.backbone": partial(_look_at_model, config.reward_backbone)
        }
        if config.reward.captions is not None:
            backbone["reward.captions"] = partial(ImageCaptions, config.reward.captions)
        return policy | backbone
    if stage == "train":
        looks: dict[str, Look] = policy | train
        if anchor.weight and anchor.prompts == QUESTIONS:
            looks["ppo.anchor.prompts"] = partial(require_questions, data.train)
        elif anchor.weight:
            looks["ppo.anchor.prompts"] = partial(rows, anchor.prompts)
        return looks
    if stage in ("eval-before", "eval-after"):
        asked = (feedback.extractor, *feedback.verifiers) if verifier_judges(config) else ()
        if config.eval.second_verifier is not None:
            asked = (*asked, config.eval.second_verifier)
        judges = _models(config, *asked) if asked else {}
        return policy | {"data.held_out": partial(rows, data.held_out)} | judges
    return {}


def _look_at_model(name: str) -> Family:
    path = resolve_checkpoint(name)
    load_processor(path)
    check_head(path)
    return family_of_type(read_json(path / "config.json")["model_type"])


def _look_at_policy(config: Config) -> None:
    family = _look_at_model(config.policy.model)
    if config.policy.train_projector:
        family.require_projector()
    if not config.merges_adapters:
        require_served_adapters(family)


def _models(config: Config, *asked: str) -> dict[str, Look]:
    """What models of the feedback need: prompts, a checkpoint, keys of endpoints."""
    looks: dict[str, Look] = {"feedback": partial(check_prompts, config)}
    for key, name in (
        ("feedback.verifier", config.feedback.local_verifier),
        ("eval.second_verifier", config.eval.second_verifier),
    ):
        if name in asked and name is not None and not name.startswith(API):
            looks[key] = partial(_look_at_model, name)
    for entry in (name.removeprefix(API) for name in asked if name.startswith(API)):
        looks[f"endpoints.{entry}"] = partial(_look_at_endpoint, entry, config)
    return looks


def _look_at_endpoint(entry: str, config: Config) -> None:
    check_prices(entry, config.endpoints[entry], config.feedback.max_cost)
    read_key(entry, config.endpoints[entry])


def _require_room(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < _LEAST_FREE:
        raise DataError(
            f"{folder}: {free / 2**20:,.0f} MiB are free on its disk, and a run needs at least "
            f"{_LEAST_FREE / 2**20:,.0f}; free some space, or write elsewhere with dir=FOLDER"
        )
