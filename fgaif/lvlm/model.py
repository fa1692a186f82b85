"""Load a checkpoint of any family, attach LoRA to its language model, run its hidden states."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from fgaif.errors import CheckpointError, DataError, first_line
from fgaif.lvlm.adapters import (
    ADAPTER_FILES,
    check_adapter_loaded,
    read_adapter,
    read_adapter_config,
)
from fgaif.lvlm.allocator import set_allocator
from fgaif.lvlm.checkpoint_files import (
    EMBEDDED,
    SCENES,
    check_weights,
    read_header,
    read_json,
)
from fgaif.lvlm.families import family_of, family_of_type, in_original_layout
from fgaif.lvlm.families.base import Family, ImageFeatures, Tensors

if TYPE_CHECKING:  # the measurements on a bare GPU machine do without pydantic
    from fgaif.config import LoraConfig

_TEMPLATE_PROBE = "What is in the image?"


def resolve_checkpoint(name: str) -> Path:
    """Turn ``scenes:policy``, ``scenes:verifier``, a directory or ``ORG/NAME@REVISION`` of the hub
    into a checked checkpoint path.

    Raises:
        CheckpointError: not a directory, nothing that the hub gives, no config.json, of no family
            that is supported, in LLaVA's original layout, quantised, or with damaged files.
    """
    path = EMBEDDED / name.removeprefix(SCENES) if name.startswith(SCENES) else _folder(name)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"model {name!r}: {config_file} does not exist; give a directory with a "
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
    try:
        family_of_type(config.get("model_type"))
    except CheckpointError as error:
        raise CheckpointError(f"model {name!r}: {error}") from error
    check_weights(path)
    return path


def split_model(text: str, option: str) -> tuple[Path, Path | None]:
    """Read ``CHECKPOINT[+ADAPTER]``; a name that exists with its ``+`` is a checkpoint.

    Both may be ``ORG/NAME@REVISION`` of the hub.

    Args:
        option: what messages call the text.

    Raises:
        CheckpointError: no such checkpoint, no adapter in the folder, or one that was trained on
            another commit of the checkpoint.
    """
    whole = Path(text).expanduser().is_dir() or "+" not in text
    name, _, behind = (text, "", "") if whole else text.rpartition("+")
    checkpoint, adapter = resolve_checkpoint(name), _folder(behind) if behind else None
    for file in ADAPTER_FILES if adapter is not None else ():
        if not (adapter / file).is_file():  # type: ignore[operator]
            raise CheckpointError(
                f"{option} {text}: {adapter}/{file} does not exist; give a LoRA adapter's folder "
                "after the +"
            )
    if adapter is not None and "@" in name:
        from fgaif.lvlm.hub import check_base

        check_base(adapter, read_adapter_config(adapter), checkpoint)
    return checkpoint, adapter


def _folder(name: str) -> Path:
    """A folder, or a model of the hub; only the latter needs a new huggingface_hub."""
    if "@" not in name:
        return Path(name).expanduser()
    from fgaif.lvlm.hub import local_folder

    return local_folder(name)


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
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    family = family_of(config)
    token = getattr(processor.tokenizer, "image_token", None) or processor.image_token
    found = processor.tokenizer.get_vocab().get(token)
    if found != config.image_token_id:
        raise CheckpointError(
            f"{path}: image token {token!r} has id {found} in the tokenizer but config.json says "
            f"{config.image_token_id}; add the token or correct the config"
        )
    largest, rows = max(processor.tokenizer.get_vocab().values()), config.text_config.vocab_size
    if largest >= rows:
        raise CheckpointError(
            f"{path}: the tokenizer has a token of id {largest}, but by config.json the weights "
            f"have rows for {rows} (vocab_size); tokens were added without resizing the "
            "embeddings, or the tokenizer is another model's: copy both from one place"
        )
    if not processor.chat_template:
        raise CheckpointError(
            f"{path}: no chat template; save one with the processor (chat_template.jinja)"
        )
    _check_template(path, processor, family.image_token(processor))
    try:
        family.check(processor, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return processor


def check_head(path: Path) -> None:
    """See by a few rows that the output layer is what config.json says: tied to the embeddings, or
    a matrix of its own.

    Raises:
        CheckpointError: it says tied and there is another matrix, which would not be loaded; or it
            says untied and there is none.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    family = family_of(config)
    places: dict[str, tuple[Path, str]] = {}
    for file in sorted(path.glob("*.safetensors")):
        places |= {family.public_of_file(name): (file, name) for name in read_header(file)}
    head = places.get(family.public_name("lm_head.weight"))
    words = places.get(family.public_name(f"{family.language}.embed_tokens.weight"))
    if not config.tie_word_embeddings and head is None:
        raise CheckpointError(
            f"{path}: config.json says tie_word_embeddings = false, but the weights have no output "
            "layer of their own (lm_head.weight); set it to true, or copy the checkpoint again"
        )
    if config.tie_word_embeddings and head is not None and words is not None:
        own, shared = (_first_rows(*place) for place in (head, words))
        if not torch.equal(own, shared):
            raise CheckpointError(
                f"{path}: config.json says tie_word_embeddings = true, but lm_head.weight differs "
                "from the embeddings and would not be loaded; set it to false"
            )


def _first_rows(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_slice(name)[:8]


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
            "checkpoint that this one was made from"
        ) from error
    if rendered.count(image_token) != 1 or _TEMPLATE_PROBE not in rendered:
        raise CheckpointError(
            f"{path}: its chat template writes {rendered[:200]!r} for an image and "
            f"{_TEMPLATE_PROBE!r}: {image_token!r} must be there once, and the text; it may be one "
            "for text alone: take that of the checkpoint that this one was made from"
        )


def load_lvlm(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    attention: str = "sdpa",
    quantization: str = "none",
) -> PreTrainedModel:
    """Load the checkpoint in evaluation mode with every parameter frozen.

    ``path`` is a directory, or a name as in :func:`resolve_checkpoint`. With ``quantization``
    "nf4" the language model's linear weights are rounded to 4 bits as they are loaded.

    Raises:
        CheckpointError: weights are missing or of the wrong shape, or bitsandbytes is.
    """
    path = _resolved(path)
    try:
        extra = _in_4_bits(path, dtype, device) if quantization == "nf4" else {}
        model, info = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    except ImportError as error:
        raise CheckpointError(
            f"policy.quantization = {quantization!r} needs bitsandbytes: pip install bitsandbytes "
            f"({first_line(error)})"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot load the model: {type(error).__name__}: {error}"
        ) from error
    if device == "cpu":
        # Fresh LoRA factors and Adam moments are full of denormals, each ~100 times slower.
        torch.set_flush_denormal(True)
        set_allocator(model.num_parameters())
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(f"{path}: {len(missing)} weights are missing, first {missing[0]}")
    for part in model.modules() if extra else ():
        # On CPUs bitsandbytes packs weights anew in the first pass without gradients, in place;
        # passes with gradients, and other roles on the same weights, cannot read them then.
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
    placed = model if extra else model.to(device)
    return placed.eval().requires_grad_(False)


def _in_4_bits(path: Path, dtype: str, device: str) -> dict[str, Any]:
    """How transformers loads the language model's linears in NF4 with double quantisation (QLoRA,
    arXiv 2305.14314), the rest as it is; products are computed in ``dtype``."""
    family = family_of(AutoConfig.from_pretrained(path, local_files_only=True))
    whole = [family.tower, *family.loose, "lm_head"]
    whole += [family.projector] if family.projector else []
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=whole,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def attach_lora(
    model: PreTrainedModel, lora: "LoraConfig", seed: int, *, projector: bool = False
) -> PeftModel:
    """Add a fresh LoRA adapter on the language model's linear layers; only it is trainable.

    The adapter's B starts at zero, so the model's function is unchanged. ``seed`` fixes A. With
    ``projector`` the adapter also holds a trainable copy of the multi-modal projector; where the
    adapter is disabled, the model runs the frozen one.
    """
    family = family_of(model.config)
    whole = [family.require_projector().rpartition(".")[2]] if projector else None
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=family.lora_targets,
        modules_to_save=whole,
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, settings)
    check_adapter_anchored(peft_model)
    return peft_model


def load_adapter(model: PreTrainedModel, adapter: Path, *, trainable: bool = False) -> PeftModel:
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
    language = f".{family_of(base_of(model).config).language}."
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    outside = [name for name in names if language not in name]
    if outside or not names:
        raise CheckpointError(
            f"LoRA weights outside the language model: {outside[:3]} (of {len(names)}); the "
            "rollout engine would ignore them"
        )


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model inside an optional PEFT wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _resolved(path: str | Path) -> Path:
    return resolve_checkpoint(path) if isinstance(path, str) else path


def model_family(model: nn.Module) -> Family:
    """The family of a loaded model."""
    return family_of(base_of(model).config)


@torch.no_grad()
def image_features(model: nn.Module, images: Sequence[Tensors]) -> list[ImageFeatures]:
    """Each image's features in the language model's space.

    Vision tower and projector are frozen, so no graph is kept.
    """
    return model_family(model).features(base_of(model), images)


@torch.no_grad()
def vision_features(model: nn.Module, images: Sequence[Tensors]) -> list[ImageFeatures]:
    """What the projector is given, of each image; for families whose projector can be trained."""
    compute = model_family(model).unprojected
    assert compute is not None, "attach_lora refuses the projectors of other families"
    return compute(base_of(model), images)


def project(model: nn.Module, features: ImageFeatures) -> ImageFeatures:
    """Project vision features into the language model's space, with gradient."""
    compute = model_family(model).project
    assert compute is not None, "attach_lora refuses the projectors of other families"
    return compute(base_of(model), features)


def last_hidden(model: nn.Module, input_ids: Tensor, features: ImageFeatures) -> Tensor:
    """Last hidden state (B, L, D) of right-padded ``input_ids`` (B, L) with images placed.

    Padding is on the right and attention is causal, so no mask is needed: padded positions see
    the text, never the other way round.

    Raises:
        DataError: the ids have placeholders for more or fewer features.
    """
    base = base_of(model)
    embeddings = base.get_input_embeddings()(input_ids)
    placeholders = input_ids == base.config.image_token_id
    rows = features.rows[:, : embeddings.shape[-1]]
    if (count := int(placeholders.sum())) != len(rows):
        raise DataError(
            f"{count} image placeholders for {len(rows)} image features; the processor's files do "
            "not belong to the checkpoint's weights: copy both from one place"
        )
    embeddings = embeddings.masked_scatter(placeholders.unsqueeze(-1), rows.to(embeddings.dtype))
    family = model_family(model)
    language_model = base.get_submodule(family.language)
    told = family.positions(base, input_ids, features)
    return language_model(inputs_embeds=embeddings, use_cache=False, **told).last_hidden_state
