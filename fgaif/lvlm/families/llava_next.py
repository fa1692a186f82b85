"""LLaVA-NeXT (1.6): an image as a whole and in tiles, a learned row end between rows of patches.

``pixel_values`` (I, tiles, 3, H, W) with ``image_sizes`` (I, 2); how many tiles and tokens there
are depends on the image's aspect.
"""

from collections.abc import Sequence
from typing import Any

from fgaif.errors import CheckpointError
from fgaif.lvlm.families.base import (
    Family,
    ImageFeatures,
    Shown,
    Tensors,
    VisionFacts,
    check_feature_strategy,
    projected,
    tower_facts,
)


def expand(processor: Any, config: Any, image: Shown) -> str:
    """A placeholder for each feature that the processor counts for an image of this size."""
    (count,) = processor._get_num_multimodal_tokens([image.size()]).num_image_tokens
    return str(processor.image_token) * int(count)


def features(model: Any, images: Sequence[Tensors]) -> list[ImageFeatures]:
    """One by one: images have different numbers of tiles."""
    names = ("pixel_values", "image_sizes")
    return [
        ImageFeatures(rows=projected(model, {name: image[name] for name in names}))
        for image in images
    ]


def tiles(config: Any) -> tuple[int, int, int]:
    """Most tiles of one image beside the whole, their patches in all, and in one column."""
    size, side = config.vision_config.image_size, patches(config)
    grids = [(high // size, wide // size) for high, wide in config.image_grid_pinpoints]
    most = max(high * wide for high, wide in grids)
    return most, most * side**2, side * max(high for high, _ in grids)


def patches(config: Any) -> int:
    """Patches on one side of a tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def seen_in_tiles(config: Any, image_tokens: int) -> VisionFacts:
    """What a tower costs that sees the whole and all tiles at once."""
    return tower_facts(
        config, image_tokens=image_tokens, tiles=1 + tiles(config)[0], class_tokens=1
    )


def _vision(config: Any, pixels: int | None) -> VisionFacts:
    _, tiled, rows = tiles(config)
    return seen_in_tiles(config, tiled + rows + patches(config) ** 2 + 1)


def check(processor: Any, config: Any) -> None:
    """Hold tiles and patches of the processor against the model's."""
    ours = [list(each) for each in processor.image_processor.image_grid_pinpoints]
    theirs = [list(each) for each in config.image_grid_pinpoints]
    if ours != theirs:
        raise CheckpointError(
            f"preprocessor_config.json: image_grid_pinpoints = {ours}, but config.json has "
            f"{theirs}; set them to those of config.json"
        )
    check_feature_strategy(processor, config)


PUBLIC = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    # vLLM refuses a tower without `vision_model.`, which transformers 5 drops when it saves.
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
)

LLAVA_NEXT = Family(
    name="LLaVA-NeXT",
    model_types=("llava_next",),
    public=PUBLIC,
    features=features,
    vision=_vision,
    loose=("model.image_newline",),
    expand=expand,
    check=check,
)
