"""Sizes of a LLaVA checkpoint: parameters by part and shapes, without reading or making weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from fgaif.config import LoraConfig
from fgaif.errors import CheckpointError
from fgaif.lvlm.checkpoint_files import read_header
from fgaif.lvlm.inputs import image_token_count

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
    image_size: int
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


def read_facts(path: Path) -> ModelFacts:
    """Facts of a checkpoint folder, from config.json and the headers of its safetensors files.

    Raises:
        CheckpointError: it holds no safetensors weights, or a damaged file.
    """
    shapes: dict[str, list[int]] = {}
    for file in sorted(path.glob("*.safetensors")):
        shapes |= {name: item["shape"] for name, item in read_header(file).items()}
    if not shapes:
        raise CheckpointError(f"{path}: no *.safetensors weights; pickled weights are not loaded")
    return _facts(LlavaConfig.from_pretrained(path, local_files_only=True), shapes)


def config_facts(config: LlavaConfig) -> ModelFacts:
    """Facts of the model that a configuration describes; nothing is allocated.

    ``config_facts(LlavaConfig())`` are those of LLaVA-1.5-7B but for 64 rows of the vocabulary.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return _facts(config, {name: tuple(p.shape) for name, p in model.named_parameters()})


def _facts(config: LlavaConfig, shapes: Shapes) -> ModelFacts:
    text, vision = config.text_config, config.vision_config

    def count(part: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if part in name)

    tower, projector = count("vision_tower"), count("multi_modal_projector")
    return ModelFacts(
        language=count("") - tower - projector,
        vision=tower,
        projector=projector,
        linears=tuple(
            (shape[0], shape[1])
            for name, shape in sorted(shapes.items())
            if "language_model" in name and len(shape) == 2 and "_proj" in name
        ),
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        max_length=text.max_position_embeddings,
        image_tokens=image_token_count(config),
        image_size=vision.image_size,
        vision_hidden=vision.hidden_size,
        vision_ffn=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers,
        vision_tokens=(vision.image_size // vision.patch_size) ** 2 + 1,
    )
