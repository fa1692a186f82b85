"""The adapter as it travels: LoRA factors by Hugging Face module name."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from peft import PeftConfig
from safetensors.numpy import load_file

from fgaif.checkpoint import arrays_digest
from fgaif.errors import CheckpointError
from fgaif.types import FloatArray, WeightsManifest

_PEFT_PREFIX = "base_model.model."


def factor_name(parameter: str) -> str:
    """Turn PEFT's name of a LoRA parameter into ``<module>.lora_A`` or ``<module>.lora_B``.

    ``base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight``
    becomes ``model.language_model.layers.0.self_attn.q_proj.lora_A``, in memory as on disk (where
    PEFT leaves out the adapter's name).
    """
    module, dot, rest = parameter.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
    if not dot:
        raise CheckpointError(f"{parameter!r} is not a LoRA parameter")
    return f"{module}.lora_{rest[0]}"


def make_manifest(
    factors: Mapping[str, FloatArray], *, scaling: float, version: int
) -> WeightsManifest:
    """Number and digest LoRA factors given by PEFT parameter name."""
    tensors = {
        factor_name(name): np.array(value, dtype=np.float32) for name, value in factors.items()
    }
    return WeightsManifest(
        version=version, digest=arrays_digest(tensors), scaling=scaling, tensors=tensors
    )


def manifest_from_adapter(directory: Path, *, version: int) -> WeightsManifest:
    """Read a saved PEFT adapter directory as a numbered version.

    Raises:
        CheckpointError: the directory holds no LoRA adapter.
    """
    try:
        config = PeftConfig.from_pretrained(str(directory))
        factors = load_file(directory / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: not an adapter directory: {error}") from error
    scaling = config.lora_alpha / config.r
    return make_manifest(factors, scaling=scaling, version=version)
