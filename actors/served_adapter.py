"""An adapter as vLLM serves it: a PEFT folder that is read once, and one LoRA request a version."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.numpy import save_file

from fgaif.errors import ConfigError
from fgaif.lvlm.families.base import LORA_LEAVES
from fgaif.lvlm.weights import PEFT_PREFIX, split_tensors
from fgaif.types import FloatArray, Json, WeightsManifest

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes of a LoRA slot that vLLM can reserve (``vllm.config.lora.MaxLoRARanks``)."""
_SHARED_MEMORY = Path("/dev/shm")


def lora_slot(rank: int) -> int:
    """Rank of the slot that vLLM reserves for adapters of at most this rank.

    Raises:
        ConfigError: vLLM has no slot so large.
    """
    slot = next((size for size in RANKS if size >= rank), None)
    if slot is None:
        raise ConfigError(
            f"policy.lora.r = {rank}: vLLM serves adapters of rank {RANKS[-1]} at most; lower it, "
            "or set cluster.engine.adapters=merged"
        )
    return slot


def lora_settings(rank: int) -> Json:
    """vLLM's engine arguments for one adapter of at most this rank on the language model.

    Raises:
        ConfigError: vLLM has no slot so large.
    """
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": lora_slot(rank),
        # As vLLM fuses them. Left out, it reserves slots on embeddings and output layer too.
        "lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    }


def write_adapter(manifest: WeightsManifest) -> Path | None:
    """Write a version's LoRA factors as a PEFT folder, in memory where there is room for it.

    Returns None for a version without factors. The caller removes the folder.
    """
    _, factors = split_tensors(manifest.tensors)
    if not factors:
        return None
    size = sum(array.nbytes for pair in factors.values() for array in pair.values())
    folder = Path(tempfile.mkdtemp(prefix="fgaif-adapter-", dir=_scratch(size)))
    rank = max(pair["lora_A"].shape[0] for pair in factors.values())
    settings: Json = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": manifest.scaling * rank,
        "target_modules": list(LORA_LEAVES),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(_named(factors), folder / "adapter_model.safetensors")
    return folder


def _named(factors: Mapping[str, Mapping[str, FloatArray]]) -> dict[str, FloatArray]:
    return {
        f"{PEFT_PREFIX}{module}.{factor}.weight": array
        for module, pair in factors.items()
        for factor, array in pair.items()
    }


def _scratch(size: int) -> Path | None:
    """Shared memory if twice this many bytes are free there, else the usual temporary folder."""
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return None
    return _SHARED_MEMORY if free > 2 * size else None
