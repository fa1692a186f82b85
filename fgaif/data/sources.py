"""Where a run's prompts come from: the embedded world or the user's files, behind one door."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fgaif.config import Config
from fgaif.data.images import check_image
from fgaif.data.prompts import COCO, SCENES, CheckImage, PromptSet, load_prompts
from fgaif.data.scenes.files import read_scenes
from fgaif.data.scenes.questions import sample_question
from fgaif.data.scenes.world import Scene
from fgaif.errors import ConfigError
from fgaif.types import Prompt

QUESTIONS = f"{SCENES}questions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A loaded prompt set, and the scene of each prompt where the world is known."""

    prompts: PromptSet
    scenes: dict[str, Scene] | None = None

    def scene_of(self, prompt: Prompt) -> Scene:
        """The scene graph behind a prompt of the embedded world."""
        assert self.scenes is not None, "asked for the scene of a user's image"
        return self.scenes[prompt.id]


def of_scenes(name: str) -> bool:
    """Whether prompts of this name are of the embedded world, whose truth is known."""
    return name.startswith(SCENES)


def open_source(name: str, config: Config, limit: int, check: CheckImage = check_image) -> Source:
    """Load ``scenes:SPLIT`` (drawn into the run folder first), a prompts file, or ``coco:PATH``.

    Of COCO, and with ``data.shuffle`` of a file, ``limit`` prompts are drawn by ``data.seed``; a
    smaller limit draws the first of them. ``check`` looks at each image.

    Raises:
        DataError: the file, a row or a column cannot be used, or there is no such split.
    """
    drawn = name.startswith(COCO) or (config.data.shuffle and not of_scenes(name))
    loaded = load_prompts(
        name,
        root=config.data.image_root,
        limit=limit,
        seed=config.data.seed if drawn else None,
        cache=config.run_dir / "data",
        max_pixels=config.data.max_image_pixels,
        check=check,
    )
    if not of_scenes(name):
        return Source(prompts=loaded)
    folder = Path(loaded.prompts[0].image.path).parents[1]
    return Source(prompts=loaded, scenes=read_scenes(folder / "scenes.jsonl"))


def split_prompts(source: Source, config: Config) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts for feedback and for PPO: disjoint, unless the set is too small for both."""
    prompts = source.prompts.prompts
    feedback = prompts[: config.data.feedback_prompts]
    rest = prompts[config.data.feedback_prompts :]
    return feedback, (rest or prompts)[: config.data.ppo_prompts]


def open_anchors(
    config: Config, train: Source, prompts: Sequence[Prompt], check: CheckImage = check_image
) -> list[Prompt]:
    """Questions whose answers PPO must not change; none if the anchor is off.

    ``check`` looks at each image.
    """
    anchor = config.ppo.anchor
    if anchor.weight == 0:
        return []
    if anchor.prompts != QUESTIONS:
        return list(
            open_source(anchor.prompts, config, config.data.ppo_prompts, check).prompts.prompts
        )
    require_questions(config.data.train)
    return [_question_about(prompt, train.scene_of) for prompt in prompts]


def require_questions(train: str) -> None:
    """See that questions can be drawn about the prompts of step 3.

    Raises:
        ConfigError: they are not of the embedded world.
    """
    if not train.startswith(SCENES):
        raise ConfigError(
            f"ppo.anchor.prompts = {QUESTIONS!r} needs the embedded world: name a file of "
            "questions about your images, or set ppo.anchor.weight=0"
        )


def _question_about(prompt: Prompt, scene_of: Callable[[Prompt], Scene]) -> Prompt:
    question = sample_question(scene_of(prompt), random.Random(f"anchor {prompt.id}"))
    return replace(prompt, id=f"{prompt.id}?", text=question.text)
