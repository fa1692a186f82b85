"""Random checkpoints of every family: true layout, tokens, processor and template, small sizes.

Each has two layers, a few hundred thousand weights, and some dozen tokens to an image at most.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GenerationConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from fgaif.lvlm.export import save_model

QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
# As the published checkpoints write a conversation.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(specials: Sequence[str], **named: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE with these special tokens first and nothing put before a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(tiny.SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left", **named)


def text_config(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """Two narrow layers, grouped queries; heads of 32, the least that vLLM's CPU kernels take."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,  # the default makes so narrow a model almost uniform
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def save(directory: Path, config: PreTrainedConfig, processor: Any, seed: int = 0) -> Path:
    """Write a random model under the names of published checkpoints, and its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).eval()
        for value in model.parameters():
            if not value.any() and value.ndim > 1:  # a projection that would let no image through
                torch.nn.init.normal_(value, std=0.2)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    save_model(model, processor, directory)
    return directory


def _qwen_tokenizer() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    tokenizer = byte_level(QWEN_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            *(("image", "image_pad"), ("video", "video_pad")),
            *(("vision_start", "vision_start"), ("vision_end", "vision_end")),
        )
    }
    return tokenizer, ids


MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
# From 2 x 2 to 4 x 5 merged patches of 28 x 28 pixels.
QWEN_SIZE = {"shortest_edge": 4 * 28 * 28, "longest_edge": 20 * 28 * 28}


def qwen2_5_vl(directory: Path) -> Path:
    """Qwen2.5-VL: windows of 2 x 2 merged patches, full attention in the last layer."""
    tokenizer, ids = _qwen_tokenizer()
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text_config(tokenizer, rope_parameters=MROPE), vision_config=vision, **ids
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=QWEN_SIZE), tokenizer, Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )  # fmt: skip
    return save(directory, config, processor)


def qwen2_vl(directory: Path) -> Path:
    """Qwen2-VL: the same tokens and positions, a plain tower, tied embeddings as in its 2B."""
    tokenizer, ids = _qwen_tokenizer()
    vision = {
        "depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2,
        "initializer_range": 0.2,
    }  # fmt: skip
    text = text_config(tokenizer, rope_parameters=MROPE, tie_word_embeddings=True)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=QWEN_SIZE), tokenizer, Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )  # fmt: skip
    return save(directory, config, processor)


def qwen3_vl(directory: Path) -> Path:
    """Qwen3-VL: patches of 16 pixels, interleaved rotary sections, one DeepStack layer."""
    tokenizer, ids = _qwen_tokenizer()
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        "initializer_range": 0.2,
    }  # fmt: skip
    rope = MROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = text_config(tokenizer, rope_parameters=rope, head_dim=32)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 20 * 32 * 32}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=size, patch_size=16), tokenizer, Qwen3VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )  # fmt: skip
    return save(directory, config, processor)


PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84]]
TILES = {"image_grid_pinpoints": PINPOINTS, "size": {"shortest_edge": 28}}
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)


def llava_next(directory: Path) -> Path:
    """LLaVA-NeXT on Mistral: a CLIP tower, tiles of 28 pixels, at most four of them."""
    tokenizer = tiny.byte_level_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14, projection_dim=32, initializer_factor=2.0,
    )  # fmt: skip
    text = MistralConfig(**text_config(tokenizer, head_dim=32, sliding_window=None))
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4,
    )  # fmt: skip
    images = LlavaNextImageProcessor(crop_size={"height": 28, "width": 28}, **TILES)
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=MISTRAL_TEMPLATE,
    )  # fmt: skip
    return save(directory, config, processor)


ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SQUARES = [[56, 56], [28, 84], [84, 28], [112, 112]]
"""Up to sixteen tiles: more than nine are pooled."""


def llava_onevision(directory: Path) -> Path:
    """LLaVA-OneVision on Qwen2: a SigLIP tower without a head, all of its layers."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    tokenizer = byte_level(specials, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**text_config(tokenizer)),
        image_grid_pinpoints=SQUARES, vision_aspect_ratio="anyres_max_9",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(
            image_grid_pinpoints=SQUARES, size={"height": 28, "width": 28}
        ),
        tokenizer,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
        vision_aspect_ratio="anyres_max_9",
    )
    return save(directory, config, processor)


SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SMOL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>"),
    *("<image>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)


def _smol(directory: Path, config: Any, processor: Any, images: Any, **more: Any) -> Path:
    tokenizer = byte_level(SMOL_TOKENS, eos_token="<end_of_utterance>", pad_token="<|endoftext|>")
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "initializer_range": 0.2,
    }  # fmt: skip
    made = config(
        text_config=text_config(tokenizer, model_type="llama", head_dim=32), vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tiles = images(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    built = processor(tiles, tokenizer, image_seq_len=4, chat_template=SMOL_TEMPLATE, **more)
    return save(directory, made, built)


def idefics3(directory: Path) -> Path:
    """Idefics3 on Llama: tiles of 32 pixels, at most 2 x 2 beside the whole, 4 tokens each."""
    return _smol(directory, Idefics3Config, Idefics3Processor, Idefics3ImageProcessor)


def smolvlm(directory: Path) -> Path:
    """SmolVLM: the same, with its own classes, whose processor needs one package more."""
    pytest.importorskip("num2words")
    return _smol(
        directory, SmolVLMConfig, SmolVLMProcessor, SmolVLMImageProcessor,
        video_processor=SmolVLMVideoProcessor(),
    )  # fmt: skip


INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def internvl(directory: Path) -> Path:
    """InternVL 3 on Qwen2: tiles of 32 pixels, at most four beside the whole, 4 tokens each."""
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values())
    tokenizer = byte_level(
        specials, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named
    )
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": [32, 32], "patch_size": [8, 8],
        "attention_bias": True, "initializer_range": 0.2,
    }  # fmt: skip
    config = InternVLConfig(
        text_config=text_config(tokenizer, model_type="qwen2"), vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    images = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, max_patches=4)
    processor = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(), image_seq_length=4,
        chat_template=INTERNVL_TEMPLATE,
    )  # fmt: skip
    return save(directory, config, processor)


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma3(directory: Path) -> Path:
    """Gemma 3: a sliding and a full layer, 4 tokens an image, tied embeddings."""
    named = {
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }  # fmt: skip
    specials = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *named.values())
    tokenizer = byte_level(
        specials, bos_token="<bos>", eos_token="<end_of_turn>", pad_token="<pad>",
        extra_special_tokens=named,
    )  # fmt: skip
    tokenizer.add_tokens(["\n", "\n\n", "\n\n\n", "\n\n\n\n"])  # runs of them are one token
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8, vision_use_head=False,
    )  # fmt: skip
    text = text_config(
        tokenizer, head_dim=32, query_pre_attn_scalar=32, sliding_window=64,
        layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=True,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )  # fmt: skip
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}), tokenizer, image_seq_length=4,
        chat_template=GEMMA_TEMPLATE,
    )  # fmt: skip
    return save(directory, config, processor)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen2_vl": qwen2_vl,
    "llava": tiny.build_tiny_llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
}
"""By ``model_type``."""
