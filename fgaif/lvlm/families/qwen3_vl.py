"""Qwen3-VL: Qwen2.5-VL's images and positions; some of the tower's layers speak to the first layers
of the language model themselves (DeepStack)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fgaif.lvlm.families import qwen_vl
from fgaif.lvlm.families.base import Family, ImageFeatures, Tensors, VisionFacts
from fgaif.types import Json

LEAST_PIXELS, MOST_PIXELS = 65_536, 16_777_216
"""Between which the published processors scale images: 64 and 16,384 tokens of 32 x 32 pixels."""


def _features(model: Any, images: Sequence[Tensors]) -> list[ImageFeatures]:
    return [_seen(model, image) for image in images]


def _seen(model: Any, image: Tensors) -> ImageFeatures:
    """Rows of the tower's end and of each layer that speaks, side by side."""
    grid = image["image_grid_thw"]
    found = model.get_image_features(
        pixel_values=image["pixel_values"], image_grid_thw=grid, return_dict=True
    )
    parts = [found.pooler_output, *found.deepstack_features]
    return ImageFeatures(rows=torch.cat([rows for (rows,) in parts], dim=-1), grids=grid)


def _positions(model: Any, input_ids: Tensor, features: ImageFeatures) -> dict[str, Any]:
    width = model.config.text_config.hidden_size
    _, *deeper = features.rows.split(width, dim=-1)
    return qwen_vl.positions(model, input_ids, features) | {
        "visual_pos_masks": input_ids == model.config.image_token_id,
        "deepstack_visual_embeds": deeper,
    }


def _bound(pixels: int) -> Json:
    return qwen_vl.bound(pixels, LEAST_PIXELS)


def _vision(config: Any, pixels: int | None) -> VisionFacts:
    return qwen_vl.vision_facts(config, pixels or MOST_PIXELS)


QWEN3_VL = Family(
    name="Qwen3-VL",
    model_types=("qwen3_vl",),
    public=(
        ("model.language_model.", "model.language_model."),
        ("model.visual.", "model.visual."),
        ("lm_head.", "lm_head."),
    ),
    features=_features,
    vision=_vision,
    tower="model.visual",
    projector=None,
    expand=qwen_vl.expand,
    written=qwen_vl.written,
    bound=_bound,
    positions=_positions,
    check=qwen_vl.check,
)
