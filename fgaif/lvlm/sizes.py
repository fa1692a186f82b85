"""Sizes of a checkpoint: parameters by part and shapes, without reading or making weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from fgaif.config import LoraConfig
from fgaif.errors import CheckpointError
from fgaif.lvlm.checkpoint_files import read_header
from fgaif.lvlm.families import family_of
from fgaif.lvlm.families.base import LORA_LEAVES

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What memory depends on. ``language`` counts the language model with its head.

    ``linears`` holds (output, input) of every linear layer that LoRA adapts.
    """

    language: int
    vision: int
    projector: int
    linears: tuple[tuple[int, int], ...]
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_length: int
    image_tokens: int
    pixel_values: int
    vision_hidden: int
    vision_ffn: int
    vision_layers: int
    vision_tokens: int

    @property
    def parameters(self) -> int:
        """Of all parts together."""
        return self.language + self.vision + self.projector

    def lora_parameters(self, lora: LoraConfig) -> int:
        """Trainable parameters of an adapter of this rank."""
        return lora.r * sum(rows + columns for rows, columns in self.linears)


def read_facts(path: Path, image_pixels: int | None = None) -> ModelFacts:
    """Facts of a checkpoint folder, from config.json and the headers of its safetensors files.

    ``image_pixels`` is `data.image_pixels`: it bounds what an image costs.

    Raises:
        CheckpointError: it holds no safetensors weights, or a damaged file.
    """
    shapes: dict[str, list[int]] = {}
    for file in sorted(path.glob("*.safetensors")):
        shapes |= {name: item["shape"] for name, item in read_header(file).items()}
    if not shapes:
        raise CheckpointError(f"{path}: no *.safetensors weights; pickled weights are not loaded")
    return _facts(AutoConfig.from_pretrained(path, local_files_only=True), shapes, image_pixels)


def config_facts(config: PretrainedConfig, image_pixels: int | None = None) -> ModelFacts:
    """Facts of the model that a configuration describes; nothing is allocated.

    ``config_facts(LlavaConfig())`` are those of LLaVA-1.5-7B but for 64 rows of the vocabulary.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return _facts(
        config, {name: tuple(p.shape) for name, p in model.named_parameters()}, image_pixels
    )


def _facts(config: PretrainedConfig, shapes: Shapes, image_pixels: int | None) -> ModelFacts:
    family, text = family_of(config), config.text_config
    vision = family.vision(config, image_pixels)
    held = {family.public_of_file(name): shape for name, shape in shapes.items()}

    def count(part: str | None) -> int:
        prefix = None if part is None else family.public_of_file(f"{part}.")
        return sum(
            math.prod(shape)
            for name, shape in held.items()
            if prefix is not None and name.startswith(prefix)
        )

    tower, projector = count(family.tower), count(family.projector)
    layers = family.public_of_file(f"{family.language}.layers.")
    return ModelFacts(
        language=sum(map(math.prod, held.values())) - tower - projector,
        vision=tower,
        projector=projector,
        linears=tuple(
            (shape[0], shape[1])
            for name, shape in sorted(held.items())
            if len(shape) == 2
            and name.startswith(layers)
            and name.removesuffix(".weight").endswith(LORA_LEAVES)
        ),
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        max_length=text.max_position_embeddings,
        image_tokens=vision.image_tokens,
        pixel_values=vision.pixel_values,
        vision_hidden=vision.hidden,
        vision_ffn=vision.ffn,
        vision_layers=vision.layers,
        vision_tokens=vision.tokens,
    )
