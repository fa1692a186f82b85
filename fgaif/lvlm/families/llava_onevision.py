"""LLaVA-OneVision: LLaVA-NeXT's tiles on a SigLIP tower, pooled where there are very many."""

from typing import Any

from fgaif.errors import CheckpointError
from fgaif.lvlm.families.base import Family, VisionFacts
from fgaif.lvlm.families.llava_next import (
    PUBLIC,
    check,
    expand,
    features,
    patches,
    seen_in_tiles,
    tiles,
)

_ASPECT = "anyres_max_9"
_POOLED_FROM = 1.1
"""Tokens are pooled where their number is larger than the square of this times the limit's."""


def _vision(config: Any, pixels: int | None) -> VisionFacts:
    _, tiled, rows = tiles(config)
    limit = int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * patches(config) ** 2
    most = min(tiled, int(limit * _POOLED_FROM**2))
    return seen_in_tiles(config, most + rows + patches(config) ** 2)


def _check(processor: Any, config: Any) -> None:
    """As LLaVA-NeXT's, and that images are pooled as vLLM pools them."""
    check(processor, config)
    for file, found in (("config.json", config), ("processor_config.json", processor)):
        if found.vision_aspect_ratio != _ASPECT:
            raise CheckpointError(
                f"{file}: vision_aspect_ratio = {found.vision_aspect_ratio!r}; vLLM counts the "
                f"tokens of an image for {_ASPECT!r} alone (_get_num_unpadded_features), so "
                "engines would read other prompts than are trained on: use a checkpoint with that"
            )


LLAVA_ONEVISION = Family(
    name="LLaVA-OneVision",
    model_types=("llava_onevision",),
    public=PUBLIC,
    features=features,
    vision=_vision,
    loose=("model.image_newline",),
    expand=expand,
    check=_check,
    serves_adapters=False,
)
