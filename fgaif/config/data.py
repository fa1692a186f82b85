"""Images and prompts."""

from pathlib import Path
from typing import TypedDict

from pydantic import Field

from fgaif.config.section import Section


class ImageLimits(TypedDict):
    """Arguments of encoders; see the keys of :class:`DataConfig`."""

    max_image_pixels: int
    image_pixels: int | None


class DataConfig(Section):
    """Images and prompts."""

    train: str = "scenes:train"
    """Prompts of steps 1 and 3: `scenes:SPLIT` (embedded world), a .jsonl/.parquet file of rows
    with `image`, `prompt` and optionally `id`, or `coco:PATH`, a COCO folder or annotation file."""
    responses: Path | None = None
    """Responses to label that some other tool sampled, instead of sampling: a .jsonl or .parquet
    file of rows with `image`, `prompt`, `response` and optionally `id`."""
    held_out: str = "scenes:test"
    """Prompts of the evaluation and of the reward models' final check, never trained on."""
    image_root: Path | None = None
    """Folder that image paths start from and must lie in, links followed; default: the folder of
    the prompts file, or of COCO's images."""
    shuffle: bool = False
    """Draw the prompts of a .jsonl or .parquet file by `data.seed` instead of taking the first;
    the images of `coco:PATH` are always drawn."""
    seed: int = 0
    """Draws prompts; apart from `seed`, so that runs compared over seeds see the same images."""
    feedback_prompts: int = Field(2000, ge=1)
    """Prompts sampled for AI feedback (the paper: 3,500 images)."""
    ppo_prompts: int = Field(2000, ge=1)
    """Prompts for PPO, disjoint from the feedback prompts where the data set is large enough
    (the paper: 14,000 images)."""
    eval_prompts: int = Field(300, ge=1)
    """Held-out prompts of the evaluation."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """Larger images are refused before they are decoded."""
    image_pixels: int | None = Field(None, ge=3136)
    """Models that see images at their own resolution (Qwen-VL) are shown larger ones shrunk to so
    many pixels, the same in all roles: 1,003,520 are 1,280 tokens of Qwen2.5-VL, whose own limit is
    16,384. Models that take images of one size, or in tiles, take no notice; default: the
    processor's own limit."""

    @property
    def image_limits(self) -> ImageLimits:
        """Both limits on images, for encoders."""
        return ImageLimits(max_image_pixels=self.max_image_pixels, image_pixels=self.image_pixels)
