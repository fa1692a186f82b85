"""Gemma 3: a fixed number of tokens an image, which see each other in both directions.

Images are not cut into tiles ("pan and scan" stays off, as in the published processors).
"""

from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from fgaif.errors import CheckpointError
from fgaif.lvlm.families.base import (
    Family,
    ImageFeatures,
    Pixels,
    Shown,
    VisionFacts,
    pixels_alone,
    preprocess,
    project_tiles,
    tile_features,
    tile_inputs,
    tower_facts,
)

PROJECTOR = "model.multi_modal_projector"


def _preprocess(processor: Any, image: Image.Image) -> Pixels:
    made = preprocess(processor, image)
    return {**made, "num_patches": made["num_crops"] + 1}  # vLLM's name, for vLLM's count


def _expand(processor: Any, config: Any, image: Shown) -> str:
    return str(processor.full_image_sequence)


def _positions(model: Any, input_ids: Tensor, features: ImageFeatures) -> dict[str, Any]:
    """Masks of both kinds of layers: causal, but for the tokens of one image."""
    from transformers.models.gemma3.modeling_gemma3 import (
        create_masks_for_vision_model,
        get_block_sequence_ids_for_mask,
    )

    is_image = (input_ids == model.config.image_token_id).int()
    # Of the embeddings only shape, dtype and device are looked at.
    like = features.rows.new_zeros(()).expand(*input_ids.shape, 1)
    masks = create_masks_for_vision_model(
        config=model.config.text_config,
        inputs_embeds=like,
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        block_sequence_ids=get_block_sequence_ids_for_mask(is_image, device=input_ids.device),
    )
    return {"attention_mask": masks}


def _vision(config: Any, pixels: int | None) -> VisionFacts:
    return tower_facts(config, image_tokens=config.mm_tokens_per_image)


def _check(processor: Any, config: Any) -> None:
    if processor.image_seq_length != config.mm_tokens_per_image:
        raise CheckpointError(
            f"processor_config.json: image_seq_length = {processor.image_seq_length}, but "
            f"mm_tokens_per_image in config.json is {config.mm_tokens_per_image}; set it to that"
        )


GEMMA3 = Family(
    name="Gemma 3",
    model_types=("gemma3",),
    public=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ),
    features=partial(tile_features, tensors=pixels_alone),
    vision=_vision,
    preprocess=_preprocess,
    expand=_expand,
    positions=_positions,
    check=_check,
    unprojected=partial(tile_inputs, projector=PROJECTOR, tensors=pixels_alone),
    project=partial(project_tiles, projector=PROJECTOR),
)
