"""The tiny LLaVA: a real LlavaForConditionalGeneration of 1.4M parameters, and its checkpoints."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from fgaif.data.scenes.draw import CELL, IMAGE_SIZE
from fgaif.lvlm.export import save_model
from fgaif.scene_models.tokenizer import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID

HIDDEN = 128
LAYERS = 4


def tiny_config(vocab_size: int) -> LlavaConfig:
    """Return the architecture: CLIP 3 x 128 with 24-pixel patches, Llama 4 x 128 with 4 heads."""
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        image_seq_length=(IMAGE_SIZE // CELL) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def random_model(vocab_size: int, seed: int = 0) -> LlavaForConditionalGeneration:
    """Return a freshly initialised tiny LLaVA in float32."""
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(tiny_config(vocab_size)).eval()


def save_checkpoint(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path
) -> None:
    """Write a float16 checkpoint under the names of the public llava-1.5 checkpoints.

    Both transformers and vLLM load these; vLLM refuses the names transformers 5 saves by itself.
    """
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    save_model(model, processor, directory, dtype=torch.float16)


def load_checkpoint(directory: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a checkpoint in float32, with its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), cast(LlavaProcessor, LlavaProcessor.from_pretrained(directory))


def vision_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the patch features that the projector reads: (B, 9, 128) from (B, 3, 72, 72)."""
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    return cast(Tensor, output.hidden_states[-2][:, 1:])


def embed(model: LlavaForConditionalGeneration, ids: Tensor, features: Tensor) -> Tensor:
    """Embed (B, L) ids with the projected features (B, 9, 128) in the places of image tokens."""
    embeddings = model.get_input_embeddings()(ids)
    projected = model.model.multi_modal_projector(features)
    places = (ids == IMAGE_ID).unsqueeze(-1).expand_as(embeddings)
    return embeddings.masked_scatter(places, projected)


def hidden_states(model: LlavaForConditionalGeneration, ids: Tensor, features: Tensor) -> Tensor:
    """Return the last hidden states (B, L, 128); right padding needs no mask in a causal model."""
    inputs = embed(model, ids, features)
    output = model.model.language_model(inputs_embeds=inputs, use_cache=False)
    return cast(Tensor, output.last_hidden_state)
