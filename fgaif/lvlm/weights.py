"""Versions of the policy as they travel: LoRA factors and whole weights by Hugging Face name."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from fgaif.checkpoint import arrays_digest
from fgaif.errors import CheckpointError
from fgaif.lvlm.adapters import adapter_scaling, read_adapter
from fgaif.lvlm.families import in_memory
from fgaif.types import FloatArray, WeightsManifest

PEFT_PREFIX = "base_model.model."
_TRAINED_COPY = ".modules_to_save.default."
_FACTORS = ("lora_A", "lora_B")
_PART_BYTES = 2**30

T = TypeVar("T")


def tensor_name(parameter: str) -> str:
    """Turn PEFT's name of a trained parameter into the manifest's, in memory as on disk.

    ``base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight``
    becomes ``model.language_model.layers.0.self_attn.q_proj.lora_A``, and
    ``base_model.model.model.multi_modal_projector.modules_to_save.default.linear_1.bias`` becomes
    ``model.multi_modal_projector.linear_1.bias``; on disk PEFT leaves out the adapter's name.

    Raises:
        CheckpointError: neither a LoRA factor nor a weight of any family's models.
    """
    name = parameter.removeprefix(PEFT_PREFIX).replace(_TRAINED_COPY, ".")
    module, dot, rest = name.rpartition(".lora_")
    if dot:
        return f"{module}.lora_{rest[0]}"
    if not in_memory(name):
        raise CheckpointError(f"weight {name!r} belongs to no part of a supported model")
    return name


def make_manifest(
    trained: Mapping[str, FloatArray], *, scaling: float, version: int
) -> WeightsManifest:
    """Number and digest trained tensors given by PEFT parameter name."""
    tensors = {
        tensor_name(name): np.array(value, dtype=np.float32) for name, value in trained.items()
    }
    return WeightsManifest(
        version=version, digest=arrays_digest(tensors), scaling=scaling, tensors=tensors
    )


def manifest_from_adapter(directory: Path, *, version: int) -> WeightsManifest:
    """Read a saved PEFT adapter directory as a numbered version.

    Raises:
        CheckpointError: the directory holds no LoRA adapter, or one of a kind that engines would
            read as another.
    """
    # With torch: numpy has no bfloat16, which is what an adapter is trained in on GPUs.
    config, trained = read_adapter(directory)
    return make_manifest(
        {name: value.float().numpy() for name, value in trained.items()},
        scaling=adapter_scaling(config),
        version=version,
    )


def split_tensors(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, dict[str, T]]]:
    """Part a manifest's tensors: whole weights by name, LoRA factors by module and factor."""
    whole: dict[str, T] = {}
    factors: dict[str, dict[str, T]] = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in _FACTORS:
            factors.setdefault(module, {})[leaf] = value
        else:
            whole[name] = value
    return whole, factors


def parts(
    tensors: Mapping[str, FloatArray], limit: int = _PART_BYTES
) -> Iterator[dict[str, FloatArray]]:
    """Cut tensors, in their order, into parts of at most ``limit`` bytes or of one tensor."""
    part: dict[str, FloatArray] = {}
    size = 0
    for name, array in tensors.items():
        if part and size + array.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = array
        size += array.nbytes
    yield part
