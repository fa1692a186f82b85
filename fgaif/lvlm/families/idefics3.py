"""Idefics3 and SmolVLM: an image as a whole and in tiles, each behind a tag of its row and column.

``pixel_values`` (tiles, 3, H, W) with ``pixel_attention_mask`` (tiles, H, W); every tile has as
many tokens as another. Tags and line breaks stand between placeholders.
"""

from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from fgaif.errors import CheckpointError
from fgaif.lvlm.families.base import (
    Family,
    Pixels,
    Tensors,
    VisionFacts,
    project_tiles,
    tile_features,
    tile_inputs,
    tower_facts,
)

PROJECTOR = "model.connector"
MOST_TILES = 16
"""Into which the published processors cut a large image, beside the whole of it."""


def _preprocess(processor: Any, image: Image.Image) -> Pixels:
    made = processor.image_processor(
        images=[[image]], return_row_col_info=True, return_tensors="np"
    )
    arrays = {name: np.asarray(value) for name, value in made.items()}
    for name in ("pixel_values", "pixel_attention_mask"):
        arrays[name] = arrays[name][0]
    return arrays | {"num_patches": np.array([len(arrays["pixel_values"])])}


def _tensors(image: Tensors) -> Tensors:
    return {name: image[name][None] for name in ("pixel_values", "pixel_attention_mask")}


def _tile_tokens(config: Any) -> int:
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2)


def _vision(config: Any, pixels: int | None) -> VisionFacts:
    tiles = MOST_TILES + 1
    return tower_facts(config, image_tokens=tiles * _tile_tokens(config), tiles=tiles)


def _check(processor: Any, config: Any) -> None:
    tokens = _tile_tokens(config)
    if processor.image_seq_len != tokens:
        raise CheckpointError(
            f"processor_config.json: image_seq_len = {processor.image_seq_len}, but image size, "
            f"patch size and scale_factor of config.json make {tokens}; set it to {tokens}"
        )


IDEFICS3 = Family(
    name="Idefics3 and SmolVLM",
    model_types=("idefics3", "smolvlm"),
    public=(
        ("model.text_model.", "model.text_model."),
        ("model.vision_model.", "model.vision_model."),
        ("model.connector.", "model.connector."),
        ("lm_head.", "lm_head."),
    ),
    features=partial(tile_features, tensors=_tensors),
    vision=_vision,
    language="model.text_model",
    tower="model.vision_model",
    projector=PROJECTOR,
    preprocess=_preprocess,
    check=_check,
    unprojected=partial(tile_inputs, projector=PROJECTOR, tensors=_tensors),
    project=partial(project_tiles, projector=PROJECTOR),
)
