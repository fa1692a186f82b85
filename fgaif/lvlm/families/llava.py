"""LLaVA-1.5 and its kin: one image of a fixed size, a CLIP or SigLIP tower, an MLP projector."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fgaif.errors import CheckpointError
from fgaif.lvlm.families.base import (
    Family,
    ImageFeatures,
    Shown,
    Tensors,
    VisionFacts,
    check_feature_strategy,
    tower_facts,
)
from fgaif.types import Json


def in_original_layout(config: Json) -> bool:
    """Whether a config.json is that of a LLaVA as its authors publish it, not transformers'."""
    return "mm_vision_tower" in config or (
        config.get("model_type") in ("llava", "llava_llama") and "vision_config" not in config
    )


def image_token_count(config: Any) -> int:
    """Number of image features per image of a LLaVA config (336 px, patch 14: 576).

    The strategy "default" leaves out the tower's first feature, whatever it is: of CLIP's that is
    [CLS], SigLIP has none.
    """
    vision = config.vision_config
    patches = int((vision.image_size // vision.patch_size) ** 2)
    with_cls = "siglip" not in vision.model_type
    return patches + with_cls - (config.vision_feature_select_strategy == "default")


def _vision(config: Any, pixels: int | None) -> VisionFacts:
    return tower_facts(config, image_tokens=image_token_count(config), class_tokens=1)


def _expand(processor: Any, config: Any, image: Shown) -> str:
    return str(processor.image_token) * image_token_count(config)


def _features(model: Any, images: Sequence[Tensors]) -> list[ImageFeatures]:
    found = model.get_image_features(pixel_values=_pixels(images), return_dict=True)
    return [ImageFeatures(rows=rows) for rows in found.pooler_output]


def _unprojected(model: Any, images: Sequence[Tensors]) -> list[ImageFeatures]:
    hidden = model.model.vision_tower(_pixels(images), output_hidden_states=True).hidden_states
    layers = model.config.vision_feature_layer
    first = int(model.config.vision_feature_select_strategy == "default")  # leaves out [CLS]
    chosen = [layers] if isinstance(layers, int) else layers
    rows = torch.cat([hidden[layer][:, first:] for layer in chosen], dim=-1)
    return [ImageFeatures(rows=each) for each in rows]


def _project(model: Any, features: ImageFeatures) -> ImageFeatures:
    return ImageFeatures(rows=model.model.multi_modal_projector(features.rows))


def _pixels(images: Sequence[Tensors]) -> Tensor:
    return torch.cat([image["pixel_values"] for image in images])


def _check(processor: Any, config: Any) -> None:
    vision = config.vision_config
    if processor.patch_size != vision.patch_size:
        raise CheckpointError(
            f"processor_config.json: patch_size = {processor.patch_size}, but the vision tower's "
            f"in config.json is {vision.patch_size}; set it to {vision.patch_size}"
        )
    check_feature_strategy(processor, config)


OLD_NAMES = (
    ("language_model.model.", "model.language_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""Names in adapters that were trained before transformers 4.52, and in memory today."""

# vLLM refuses a CLIP tower without `vision_model.`, which transformers 5 drops when it saves.
LLAVA = Family(
    name="LLaVA-1.5",
    model_types=("llava",),
    public=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ),
    features=_features,
    vision=_vision,
    expand=_expand,
    check=_check,
    unprojected=_unprojected,
    project=_project,
)
