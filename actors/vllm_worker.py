"""vLLM worker extension: merge a LoRA update into the engine's weights.

vLLM fuses projections (q, k, v; gate and up) and its CPU backend drops a linear layer's weight once
a kernel holds a packed copy. So the base weights are read from the checkpoint again and kept on
the host; each version is ``W0 + scaling * B @ A``, computed from W0 so that nothing drifts, and
loaded for the complete fused layer through the layer's own weight loader, which also shards it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fgaif.errors import CheckpointError
from fgaif.lvlm.export import public_name
from fgaif.types import FloatArray

_FUSED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class LoraMerge:
    """Mixed into vLLM's worker, whose ``model_runner`` and ``model_config`` it uses."""

    model_runner: Any
    model_config: Any

    def merge_lora(self, scaling: float, tensors: dict[str, FloatArray]) -> list[str]:
        """Load ``W0 + scaling * B @ A`` into every layer named, or nothing and say why not.

        Args:
            scaling: factor on the product.
            tensors: ``<module>.lora_A`` (r, in) and ``<module>.lora_B`` (out, r), HF names.

        Returns:
            The problems found; empty if the version was loaded.
        """
        layers = dict(self.model_runner.get_model().named_modules())
        updates = _pair(tensors)
        problems = [
            problem
            for module, factors in updates.items()
            for problem in _check(module, factors, layers, self._base_weights())
        ]
        if problems:
            return problems
        modules = {public_name(module): factors for module, factors in updates.items()}
        for fused in sorted({_fuse(module)[0] for module in modules}):
            _load(layers[fused], self._merged(fused, modules, scaling))
        return []

    def _merged(
        self, fused: str, updates: Mapping[str, dict[str, FloatArray]], scaling: float
    ) -> Iterator[tuple[Tensor, tuple[str | int, ...]]]:
        """Weights (out, in) of the members of a fused layer, each with its shard id."""
        parent, _, leaf = fused.rpartition(".")
        members = [name for name, (whole, _) in _FUSED.items() if whole == leaf] or [leaf]
        device = next(self.model_runner.get_model().parameters()).device
        for member in members:
            module = f"{parent}.{member}"
            weight = self._base_weights()[module].to(device)
            if module in updates:
                a = torch.tensor(updates[module]["lora_A"], device=device)
                b = torch.tensor(updates[module]["lora_B"], device=device)
                weight = (weight.float() + scaling * (b @ a)).to(weight.dtype)
            yield weight, _fuse(module)[1]

    def _base_weights(self) -> dict[str, Tensor]:
        """The language model's linear weights by vLLM module name, read once."""
        if not hasattr(self, "_base"):
            self._base = _read_base(Path(self.model_config.model), self.model_config.dtype)
        return self._base


def _read_base(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    index = directory / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if index.is_file()
        else [path.name for path in sorted(directory.glob("*.safetensors"))]
    )
    base = {}
    for name in files:
        with safe_open(directory / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                public = public_name(key) if key.startswith(("model.", "lm_head.")) else key
                if ".layers." in public and public.startswith("language_model."):
                    base[public.removesuffix(".weight")] = file.get_tensor(key).to(dtype)
    return base


def _pair(tensors: Mapping[str, FloatArray]) -> dict[str, dict[str, FloatArray]]:
    """Group ``<module>.lora_A`` and ``<module>.lora_B`` by module."""
    updates: dict[str, dict[str, FloatArray]] = {}
    for name, array in tensors.items():
        module, _, factor = name.rpartition(".")
        updates.setdefault(module, {})[factor] = array
    return updates


def _check(
    module: str,
    factors: Mapping[str, FloatArray],
    layers: Mapping[str, nn.Module],
    base: Mapping[str, Tensor],
) -> list[str]:
    """What keeps an update from being merged."""
    if set(factors) != {"lora_A", "lora_B"}:
        return [f"{module}: has {sorted(factors)}, needs lora_A and lora_B"]
    try:
        name = public_name(module)
    except CheckpointError as error:
        return [str(error)]
    if name not in base or _fuse(name)[0] not in layers:
        return [f"{module}: the engine has no such linear layer in its language model"]
    a, b = factors["lora_A"], factors["lora_B"]
    expected = tuple(base[name].shape)
    if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != expected:
        return [f"{module}: lora_B {b.shape} @ lora_A {a.shape} is not a weight of {expected}"]
    return []


def _fuse(module: str) -> tuple[str, tuple[str | int, ...]]:
    """vLLM layer that holds a module, and the module's shard id in it."""
    parent, _, leaf = module.rpartition(".")
    if leaf not in _FUSED:
        return module, ()
    whole, shard = _FUSED[leaf]
    return f"{parent}.{whole}", (shard,)


def _load(layer: Any, members: Iterator[tuple[Tensor, tuple[str | int, ...]]]) -> None:
    dropped = layer.weight.numel() == 0
    if dropped:
        layer.quant_method.create_weights(
            layer,
            layer.input_size_per_partition,
            layer.output_partition_sizes,
            layer.input_size,
            layer.output_size,
            layer.params_dtype,
            weight_loader=layer.weight_loader_v2,
        )
    for weight, shard in members:
        layer.weight.weight_loader(layer.weight, weight, *shard)
    if dropped:  # packs the kernel's copy anew and drops the weight again
        layer.quant_method.process_weights_after_loading(layer)
