"""Qwen2-VL and Qwen2.5-VL: images at their own resolution, positions in time, height and width.

Pixels come flattened, one row a patch (``pixel_values`` (P, 1176), ``image_grid_thw`` (I, 3)); the
tower merges 2 x 2 patches into one token. The merger is part of the tower.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fgaif.errors import CheckpointError
from fgaif.lvlm.families.base import Family, ImageFeatures, Shown, Tensors, VisionFacts
from fgaif.types import Json

LEAST_PIXELS, MOST_PIXELS = 3_136, 12_845_056
"""Between which the published processors scale images: 4 and 16,384 tokens of 28 x 28 pixels."""
START, END = "<|vision_start|>", "<|vision_end|>"


def expand(processor: Any, config: Any, image: Shown) -> str:
    """A placeholder for each merged patch of the image at the size that it is scaled to."""
    patches = processor.image_processor.get_number_of_image_patches(*image.size())
    merged = processor.image_processor.merge_size**2
    return str(processor.image_token) * int(patches // merged)


def written(processor: Any) -> str:
    """As the chat template writes an image."""
    return f"{START}{processor.image_token}{END}"


def positions(model: Any, input_ids: Tensor, features: ImageFeatures) -> dict[str, Any]:
    """Position ids (3, B, L): patches of an image are counted by row and column.

    One image after another, so ids and features must be in the same order.
    """
    is_image = (input_ids == model.config.image_token_id).int()
    found, _ = model.model.get_rope_index(
        input_ids, mm_token_type_ids=is_image, image_grid_thw=features.grids
    )
    return {"position_ids": found}


def features(model: Any, images: Sequence[Tensors]) -> list[ImageFeatures]:
    """One by one: what an image is given must not depend on its company."""
    return [_seen(model, image) for image in images]


def _seen(model: Any, image: Tensors) -> ImageFeatures:
    grid = image["image_grid_thw"]
    found = model.get_image_features(
        pixel_values=image["pixel_values"], image_grid_thw=grid, return_dict=True
    )
    (rows,) = found.pooler_output
    return ImageFeatures(rows=rows, grids=grid)


def check(processor: Any, config: Any) -> None:
    """Hold the processor's patches against the tower's."""
    vision, images = config.vision_config, processor.image_processor
    for name, ours, theirs in (
        ("patch_size", images.patch_size, vision.patch_size),
        ("merge_size", images.merge_size, vision.spatial_merge_size),
        ("temporal_patch_size", images.temporal_patch_size, vision.temporal_patch_size),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"preprocessor_config.json: {name} = {ours}, but the vision tower's in config.json "
                f"is {theirs}; set it to {theirs}"
            )


def vision_facts(config: Any, pixels: int) -> VisionFacts:
    """Of an image of so many pixels."""
    vision = config.vision_config
    width = getattr(vision, "embed_dim", vision.hidden_size)
    ffn = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    merged = vision.spatial_merge_size**2
    tokens = pixels // vision.patch_size**2
    return VisionFacts(
        image_tokens=tokens // merged,
        pixel_values=tokens * 3 * vision.temporal_patch_size * vision.patch_size**2,
        tokens=tokens,
        hidden=width,
        ffn=ffn,
        layers=vision.depth,
    )


def bound(pixels: int, least: int = LEAST_PIXELS) -> Json:
    """Bounds on the size that an image is scaled to."""
    return {"size": {"shortest_edge": min(least, pixels), "longest_edge": pixels}}


def _vision(config: Any, pixels: int | None) -> VisionFacts:
    return vision_facts(config, pixels or MOST_PIXELS)


QWEN_VL = Family(
    name="Qwen2-VL and Qwen2.5-VL",
    model_types=("qwen2_vl", "qwen2_5_vl"),
    public=(
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("lm_head.", "lm_head."),
    ),
    features=features,
    vision=_vision,
    tower="model.visual",
    projector=None,
    expand=expand,
    written=written,
    bound=bound,
    positions=positions,
    check=check,
)
