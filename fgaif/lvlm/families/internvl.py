"""InternVL 3 in transformers' layout (-hf): tiles of one size, shuffled four patches to a token.

``pixel_values`` (tiles, 3, H, W) with ``num_patches`` (I,), the tiles of each image.
"""

from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from fgaif.errors import CheckpointError
from fgaif.lvlm.families.base import (
    Family,
    Pixels,
    Shown,
    VisionFacts,
    pixels_alone,
    project_tiles,
    tile_features,
    tile_inputs,
)

PROJECTOR = "model.multi_modal_projector"
MOST_TILES = 12
"""Into which the published processors cut a large image, beside the whole of it."""


def _preprocess(processor: Any, image: Image.Image) -> Pixels:
    made = processor.image_processor(images=[image], crop_to_patches=True, return_tensors="np")
    pixels = np.asarray(made["pixel_values"])
    tiles = np.array([len(pixels)])
    named = {"image_num_patches": tiles, "image_token_id": np.array(processor.image_token_id)}
    return {"pixel_values": pixels, "num_patches": tiles} | named  # those of vLLM last


def _expand(processor: Any, config: Any, image: Shown) -> str:
    tiles = processor.image_processor.get_number_of_image_patches(
        *image.size(), {"crop_to_patches": True}
    )
    placeholders = processor.image_token * (processor.image_seq_length * int(tiles))
    return f"{processor.start_image_token}{placeholders}{processor.end_image_token}"


def _tile_patches(config: Any) -> int:
    vision = config.vision_config
    high, wide = (
        size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
    )
    return int(high * wide)


def _vision(config: Any, pixels: int | None) -> VisionFacts:
    vision, tiles = config.vision_config, MOST_TILES + 1
    high, wide = vision.image_size
    return VisionFacts(
        image_tokens=tiles * int(_tile_patches(config) * config.downsample_ratio**2),
        pixel_values=tiles * 3 * high * wide,
        tokens=tiles * (_tile_patches(config) + 1),
        hidden=vision.hidden_size,
        ffn=vision.intermediate_size,
        layers=vision.num_hidden_layers,
    )


def _check(processor: Any, config: Any) -> None:
    tokens = int(_tile_patches(config) * config.downsample_ratio**2)
    if processor.image_seq_length != tokens:
        raise CheckpointError(
            f"processor_config.json: image_seq_length = {processor.image_seq_length}, but image "
            f"size, patch size and downsample_ratio of config.json make {tokens}; set it to "
            f"{tokens}"
        )


INTERNVL = Family(
    name="InternVL 3 (-hf)",
    model_types=("internvl",),
    public=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.", "vision_tower."),
    ),
    features=partial(tile_features, tensors=pixels_alone),
    vision=_vision,
    preprocess=_preprocess,
    expand=_expand,
    check=_check,
    unprojected=partial(tile_inputs, projector=PROJECTOR, tensors=pixels_alone),
    project=partial(project_tiles, projector=PROJECTOR),
)
