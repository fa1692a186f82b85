"""Load a LLaVA checkpoint, attach LoRA to its language model, run its hidden states."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from fgaif.errors import CheckpointError
from fgaif.lvlm.adapters import check_adapter_loaded, read_adapter
from fgaif.lvlm.allocator import return_freed_tensors
from fgaif.lvlm.checkpoint_files import check_weights, in_original_layout, read_json

if TYPE_CHECKING:  # the measurements on a bare GPU machine do without pydantic
    from fgaif.config import LoraConfig

# Anchored: short names such as "q_proj" also match CLIP, where vLLM would silently ignore them.
LORA_LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_TARGETS = rf".*language_model\..*\.({'|'.join(LORA_LEAVES)})"
_SCENES = "scenes:"
_TEMPLATE_PROBE = "What is in the image?"


def resolve_checkpoint(name: str) -> Path:
    """Turn ``scenes:policy``, ``scenes:verifier``, a directory or ``ORG/NAME@REVISION`` of the hub
    into a checked checkpoint path.

    Raises:
        CheckpointError: not a directory, nothing that the hub gives, no config.json, not a LLaVA
            architecture, in LLaVA's original layout, quantised, or with damaged files.
    """
    if name.startswith(_SCENES):
        path = Path(__file__).parents[1] / "data" / "scenes" / "models" / name.removeprefix(_SCENES)
    elif "@" in name and not Path(name).expanduser().is_dir():
        from fgaif.lvlm.hub import hub_folder  # a folder needs no new huggingface_hub

        path = hub_folder(name)
    else:
        path = Path(name).expanduser()
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"model {name!r}: {config_file} does not exist; give a directory with a LLaVA "
            "checkpoint (config.json, *.safetensors, tokenizer and processor files), or a model of "
            "the Hugging Face Hub as ORG/NAME@REVISION (@main: its newest)"
        )
    config = read_json(config_file)
    if in_original_layout(config):
        raise CheckpointError(
            f"model {name!r}: a checkpoint in LLaVA's original layout: `fgaif convert {name} OUT` "
            "writes that of transformers to the folder OUT; or use one that is published so "
            "(llava-hf/...-hf)"
        )
    if "quantization_config" in config:
        raise CheckpointError(
            f"model {name!r}: quantised checkpoints are not supported; use the one in 16 or 32 bit"
        )
    if config.get("model_type") != "llava":
        raise CheckpointError(
            f"model {name!r}: model_type is {config.get('model_type')!r}, expected 'llava' "
            "(LlavaForConditionalGeneration); other architectures are not supported"
        )
    check_weights(path)
    return path


def load_processor(path: str | Path) -> Any:
    """Load tokenizer, image processor and chat template, and check that they fit together.

    ``path`` is a directory, or a name as in :func:`resolve_checkpoint`.

    Raises:
        CheckpointError: a file is missing, the tokenizer lacks the image token, or there is no
            chat template.
    """
    path = _resolved(path)
    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    except Exception as error:  # half a file fails in any of the libraries that read it
        raise CheckpointError(
            f"{path}: cannot load the processor: {type(error).__name__}: {error}"
        ) from error
    image_token = getattr(processor, "image_token", "<image>")
    vocabulary = processor.tokenizer.get_vocab()
    config = read_json(path / "config.json")
    expected = config.get("image_token_id", config.get("image_token_index"))
    if vocabulary.get(image_token) != expected:
        raise CheckpointError(
            f"{path}: image token {image_token!r} has id {vocabulary.get(image_token)} in the "
            f"tokenizer but config.json says {expected}; add the token or correct the config"
        )
    if not processor.chat_template:
        raise CheckpointError(
            f"{path}: no chat template; save one with the processor (chat_template.jinja)"
        )
    _check_template(path, processor, image_token)
    return processor


def _check_template(path: Path, processor: Any, image_token: str) -> None:
    """Render a message with an image, to see that the template is one for images."""
    content = [{"type": "image"}, {"type": "text", "text": _TEMPLATE_PROBE}]
    try:
        rendered = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise CheckpointError(
            f"{path}: its chat template cannot write a message with an image "
            f"({type(error).__name__}: {error}); it may be one for text alone: take that of the "
            "LLaVA checkpoint that this one was made from"
        ) from error
    if rendered.count(image_token) != 1 or _TEMPLATE_PROBE not in rendered:
        raise CheckpointError(
            f"{path}: its chat template writes {rendered[:200]!r} for an image and "
            f"{_TEMPLATE_PROBE!r}: {image_token!r} must be there once, and the text; it may be one "
            "for text alone: take that of the LLaVA checkpoint that this one was made from"
        )


def load_lvlm(
    path: str | Path, *, dtype: str = "float32", device: str = "cpu", attention: str = "sdpa"
) -> LlavaForConditionalGeneration:
    """Load the checkpoint in evaluation mode with every parameter frozen.

    ``path`` is a directory, or a name as in :func:`resolve_checkpoint`.

    Raises:
        CheckpointError: weights are missing or of the wrong shape.
    """
    path = _resolved(path)
    try:
        model, info = LlavaForConditionalGeneration.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot load the model: {type(error).__name__}: {error}"
        ) from error
    if device == "cpu":
        # Fresh LoRA factors and Adam moments are full of denormals, each ~100 times slower.
        torch.set_flush_denormal(True)
        return_freed_tensors(model.num_parameters())
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(f"{path}: {len(missing)} weights are missing, first {missing[0]}")
    return model.to(device).eval().requires_grad_(False)


def attach_lora(
    model: LlavaForConditionalGeneration, lora: "LoraConfig", seed: int, *, projector: bool = False
) -> PeftModel:
    """Add a fresh LoRA adapter on the language model's linear layers; only it is trainable.

    The adapter's B starts at zero, so the model's function is unchanged. ``seed`` fixes A. With
    ``projector`` the adapter also holds a trainable copy of the multi-modal projector; where the
    adapter is disabled, the model runs the frozen one.
    """
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=["multi_modal_projector"] if projector else None,
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, settings)
    check_adapter_anchored(peft_model)
    return peft_model


def load_adapter(
    model: LlavaForConditionalGeneration, adapter: Path, *, trainable: bool = False
) -> PeftModel:
    """Load a saved adapter directory onto its backbone.

    Raises:
        CheckpointError: the directory is no adapter, or does not fit the backbone tensor by tensor.
    """
    _, tensors = read_adapter(adapter)
    try:
        peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{adapter}: does not fit the backbone: {error}") from error
    check_adapter_anchored(peft_model)
    check_adapter_loaded(peft_model, adapter, tensors)
    return peft_model


def without_dropout(model: nn.Module) -> None:
    """Put the model in evaluation mode for good, whether or not its layers are checkpointed.

    PPO compares a policy, or its values, before and after a step: dropout in either would pass for
    the step's effect. transformers checkpoints a layer only in training mode, so those that are to
    be checkpointed stay in it, and the attention, norms and adapters within them do not.
    """
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = layer.gradient_checkpointing


def check_adapter_anchored(model: PeftModel) -> None:
    """Raise CheckpointError if adapter weights sit outside the language model, or none exist."""
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    outside = [name for name in names if ".language_model." not in name]
    if outside or not names:
        raise CheckpointError(
            f"LoRA weights outside the language model: {outside[:3]} (of {len(names)}); the "
            "rollout engine would ignore them"
        )


def base_of(model: nn.Module) -> LlavaForConditionalGeneration:
    """The LLaVA model inside an optional PEFT wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _resolved(path: str | Path) -> Path:
    return resolve_checkpoint(path) if isinstance(path, str) else path


@torch.no_grad()
def image_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Project images into the language model's space: (B, 3, H, W) -> (B, image tokens, D).

    Vision tower and projector are frozen, so no graph is kept.
    """
    output = base_of(model).get_image_features(pixel_values=pixel_values, return_dict=True)
    return torch.stack(list(output.pooler_output))


@torch.no_grad()
def vision_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """What the projector is given: (B, 3, H, W) -> (B, image tokens, width of the vision tower)."""
    base = base_of(model)
    hidden = base.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    layers = base.config.vision_feature_layer
    first = int(base.config.vision_feature_select_strategy == "default")  # leaves out [CLS]
    chosen = [layers] if isinstance(layers, int) else layers
    return torch.cat([hidden[layer][:, first:] for layer in chosen], dim=-1)


def project(model: nn.Module, features: Tensor) -> Tensor:
    """Project vision features into the language model's space, with gradient: -> (B, N, D)."""
    projected: Tensor = base_of(model).model.multi_modal_projector(features)
    return projected


def last_hidden(model: nn.Module, input_ids: Tensor, features: Tensor) -> Tensor:
    """Last hidden state (B, L, D) of right-padded ``input_ids`` (B, L) with images placed.

    Padding is on the right and attention is causal, so no mask is needed: padded positions see
    the text, never the other way round.
    """
    base = base_of(model)
    embeddings = base.get_input_embeddings()(input_ids)
    placeholders = (input_ids == base.config.image_token_id).unsqueeze(-1)
    embeddings = embeddings.masked_scatter(placeholders, features.to(embeddings.dtype))
    language_model = base.model.language_model
    return language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
