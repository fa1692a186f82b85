"""What a saved LoRA adapter says of itself and holds: one reading for all who load adapters."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from fgaif.errors import CheckpointError
from fgaif.lvlm.checkpoint_files import read_json, read_tensors
from fgaif.lvlm.families import LANGUAGE_PARTS, OLD_NAMES, PROJECTOR_PARTS

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PREFIX = "base_model.model."
_FACTOR = re.compile(rf".+\.({'|'.join(LANGUAGE_PARTS)})\..+\.lora_([AB])\.weight")
_WHOLE = re.compile(rf".+\.({'|'.join(PROJECTOR_PARTS)})\..+")


def read_adapter_config(directory: Path) -> LoraConfig:
    """Read what PEFT wrote beside an adapter.

    Raises:
        CheckpointError: no LoRA adapter, or one with options under which ``scaling * B @ A`` is not
            the update of every layer.
    """
    missing = [name for name in ADAPTER_FILES if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(f"{directory}: no {missing[0]}; give the folder of a PEFT adapter")
    read_json(directory / ADAPTER_FILES[0])
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # PEFT trusts the file's values, and fails on them in many ways
        raise CheckpointError(f"{directory}: not an adapter directory: {error}") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{directory}: a {config.peft_type} adapter; only LoRA is supported")
    patterns = ("use_dora", "alpha_pattern", "rank_pattern", "lora_bias", "use_qalora")
    other = [key for key in patterns if getattr(config, key, None)]
    other += ["bias"] if config.bias != "none" else []
    others = set(config.modules_to_save or ()) - set(PROJECTOR_PARTS)
    other += ["modules_to_save"] if others else []
    if other:
        whole = " or ".join(PROJECTOR_PARTS)
        raise CheckpointError(
            f"{directory}/adapter_config.json: {', '.join(other)} is set; only adapters with one "
            f"rank and one alpha are supported, and of whole modules {whole} alone"
        )
    return config


def adapter_scaling(config: LoraConfig) -> float:
    """Factor on ``B @ A``: alpha / r, or alpha / sqrt(r) for rank-stabilised adapters."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def read_adapter(directory: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter whole: its settings, and every tensor by PEFT's present name on disk.

    Raises:
        CheckpointError: as :func:`read_adapter_config`; a tensor is not finite, is neither a LoRA
            factor of the language model nor a weight of the projector, has another rank, or lacks
            its other factor.
    """
    config = read_adapter_config(directory)
    file = directory / ADAPTER_FILES[1]
    tensors = {_present_name(name): tensor for name, tensor in read_tensors(file).items()}
    for name, tensor in tensors.items():
        found = _FACTOR.fullmatch(name)
        if found is None and not _WHOLE.fullmatch(name):
            raise CheckpointError(
                f"{file}: {name} belongs to no part of a model that can be adapted (its language "
                "model by LoRA, its projector whole); was the adapter trained on another "
                "architecture, or on the language model alone?"
            )
        if found is None:
            continue
        factor = found[2]
        other = name.replace(f".lora_{factor}.", f".lora_{'BA'[factor == 'B']}.")
        if other not in tensors:
            raise CheckpointError(f"{file}: {name} is there and {other} is not; copy it again")
        rank = tensor.shape[0 if factor == "A" else -1] if tensor.ndim == 2 else 0
        if rank != config.r:
            raise CheckpointError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, but adapter_config.json says "
                f"r = {config.r}"
            )
    if not tensors:
        raise CheckpointError(f"{file}: holds no tensors; there is nothing to load")
    return config, tensors


def check_adapter_loaded(
    model: PeftModel, directory: Path, tensors: Mapping[str, Tensor], adapter: str = "default"
) -> None:
    """See that a PEFT model holds exactly the tensors that :func:`read_adapter` has read.

    PEFT leaves out what does not match and keeps what is missing at its random start.

    Raises:
        CheckpointError: tensors are missing, unexpected, or differ.
    """
    # Of its own accord PEFT would look for the base model, at the hub too, to compare embeddings.
    held: Mapping[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    )
    for what, names in (
        ("lacks", sorted(held.keys() - tensors.keys())),
        ("holds what the model has no place for:", sorted(tensors.keys() - held.keys())),
        (
            "was not loaded:",
            sorted(n for n in held.keys() & tensors.keys() if _differ(held[n], tensors[n])),
        ),
    ):
        if names:
            raise CheckpointError(
                f"{directory}: the adapter {what} {names[0]} ({len(names)} of {len(held)} tensors);"
                " it belongs to another checkpoint, or was cut"
            )


def _differ(held: Tensor, saved: Tensor) -> bool:
    return held.shape != saved.shape or not held.cpu().equal(saved.to(held.dtype))


def _present_name(name: str) -> str:
    for old, new in OLD_NAMES:
        if name.startswith(_PREFIX + old):
            return _PREFIX + new + name.removeprefix(_PREFIX + old)
    return name
