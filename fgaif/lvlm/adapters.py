"""What a saved LoRA adapter says of itself: one reading for all who load adapters."""

import math
from pathlib import Path

from peft import LoraConfig, PeftConfig

from fgaif.errors import CheckpointError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def read_adapter_config(directory: Path) -> LoraConfig:
    """Read what PEFT wrote beside an adapter.

    Raises:
        CheckpointError: no LoRA adapter, or one with options under which ``scaling * B @ A`` is not
            the update of every layer.
    """
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory}: not an adapter directory: {error}") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{directory}: a {config.peft_type} adapter; only LoRA is supported")
    other = [key for key in ("use_dora", "alpha_pattern", "rank_pattern") if getattr(config, key)]
    if other:
        raise CheckpointError(
            f"{directory}/adapter_config.json: {', '.join(other)} is set; only adapters with one "
            "rank and one alpha are supported"
        )
    return config


def adapter_scaling(config: LoraConfig) -> float:
    """Factor on ``B @ A``: alpha / r, or alpha / sqrt(r) for rank-stabilised adapters."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
