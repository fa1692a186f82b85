"""Weights from the learner into a vLLM worker, through vLLM's own weight-transfer interface.

vLLM's backends move weights by NCCL or CUDA IPC, which ties the engines to the learner in one
collective group or on one GPU. ``HostTransfer`` is one more backend: the tensors come through host
memory, as the object store hands them over, so an engine may join at any time and anywhere, also
without a GPU.

A version is everything in which the policy differs from the checkpoint that the engine was started
from: whole weights, LoRA factors, or both. A layer is always computed from the checkpoint,
``W0 + scaling * B @ A``, so that nothing drifts, and a layer that a version does not name gets its
checkpoint's weights back. vLLM fuses projections (q, k, v; gate and up), so all members of a
touched layer are loaded together; names, shards and packed kernels are then vLLM's business.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from fgaif.errors import CheckpointError
from fgaif.lvlm.export import public_name
from fgaif.lvlm.weights import split_tensors

_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class WeightsCheck:
    """Mixed into vLLM's worker, whose ``weight_transfer_engine`` it asks."""

    weight_transfer_engine: Any

    def weights_problems(self, shapes: dict[str, list[int]]) -> list[str]:
        """What keeps tensors of these shapes, by manifest name, from being loaded."""
        problems: list[str] = self.weight_transfer_engine.problems(shapes)
        return problems


@dataclass
class Nothing(WeightTransferInitInfo):
    """There is no connection to set up."""


@dataclass
class Part(WeightTransferUpdateInfo):
    """Some tensors of a version in safetensors format, and the factor on its LoRA products."""

    tensors: bytes
    scaling: float


class HostTransfer(WeightTransferEngine[Nothing, Part]):
    """Collects the parts of a version; nothing in the model is touched before the last is here."""

    init_info_cls = Nothing
    update_info_cls = Part

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._checkpoint = _Checkpoint(Path(self.model_config.model))
        self._incoming: dict[str, Tensor] = {}
        self._scaling = 1.0
        self._changed: set[str] = set()

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Do nothing: tensors come with the calls."""

    def start_weight_update(self) -> None:
        """Begin a version."""
        self._incoming = {}

    def receive_weights(self, update_info: Part) -> None:
        """Keep a part of the version."""
        self._incoming |= load(update_info.tensors)
        self._scaling = update_info.scaling

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        """Load the version: the layers it names, and those that only the last version named."""
        full, factors = split_tensors(self._incoming)
        whole = {public_name(name): value for name, value in full.items()}
        updates = {f"{public_name(module)}.weight": pair for module, pair in factors.items()}
        named = {_layer_of(name) for name in [*whole, *updates]}
        layers = sorted(named | self._changed)
        modules = dict(self.model.named_modules())
        # The engine leaves out layers that it has no use for, such as the vision tower's last.
        reloaded = [modules[layer] for layer in layers if layer in modules]
        for module in reloaded:
            initialize_layerwise_reload(module)
        self.model.load_weights(self._values(layers, whole, updates))
        for module in reloaded:
            finalize_layerwise_reload(module, self.model_config)
        self._changed, self._incoming = named, {}

    def shutdown(self) -> None:
        """Do nothing: there is no connection."""

    def problems(self, shapes: Mapping[str, list[int]]) -> list[str]:
        """What keeps tensors of these shapes from being loaded."""
        full, factors = split_tensors(shapes)
        found = [self._check(name, tuple(shape)) for name, shape in full.items()]
        found += [self._check_pair(module, pair) for module, pair in factors.items()]
        return [problem for problem in found if problem]

    def _values(
        self,
        layers: list[str],
        whole: Mapping[str, Tensor],
        updates: Mapping[str, Mapping[str, Tensor]],
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the layers by its name in the checkpoint, computed when it is drawn."""
        dtype = self.model_config.dtype
        for name in (name for layer in layers for name in self._checkpoint.layers[layer]):
            value = whole[name] if name in whole else self._checkpoint[name]
            value = value.to(self.device, dtype)
            if name in updates:
                a, b = (updates[name][key].to(self.device) for key in ("lora_A", "lora_B"))
                value = (value.float() + self._scaling * (b @ a)).to(dtype)
            yield name, value

    def _check(self, name: str, shape: tuple[int, ...]) -> str | None:
        try:
            expected = self._checkpoint.shapes.get(public_name(name))
        except CheckpointError as error:
            return str(error)
        if expected is None:
            return f"{name}: the engine's checkpoint has no such weight"
        return None if shape == expected else f"{name}: shape {shape} instead of {expected}"

    def _check_pair(self, module: str, pair: Mapping[str, list[int]]) -> str | None:
        if set(pair) != {"lora_A", "lora_B"}:
            return f"{module}: has {sorted(pair)}, needs lora_A and lora_B"
        (rank, inner), (outer, rank_b) = pair["lora_A"], pair["lora_B"]
        if rank != rank_b:
            return f"{module}: lora_A has rank {rank}, lora_B {rank_b}"
        problem = self._check(f"{module}.weight", (outer, inner))
        if problem is None and not public_name(module).startswith("language_model."):
            return f"{module}: LoRA factors outside the language model"
        return problem


class _Checkpoint:
    """A checkpoint's tensors by public name, read when first asked for and kept on the host."""

    def __init__(self, directory: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.layers: dict[str, list[str]] = {}
        """Names of the tensors that make up a layer of vLLM's."""
        self._places: dict[str, tuple[Path, str]] = {}
        self._kept: dict[str, Tensor] = {}
        for path in _weight_files(directory):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    name = public_name(key) if key.startswith(("model.", "lm_head.")) else key
                    self.shapes[name] = tuple(file.get_slice(key).get_shape())
                    self.layers.setdefault(_layer_of(name), []).append(name)
                    self._places[name] = path, key

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            path, key = self._places[name]
            with safe_open(path, framework="pt") as file:
                self._kept[name] = file.get_tensor(key)
        return self._kept[name]


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [directory / name for name in sorted(set(places.values()))]
    return sorted(directory.glob("*.safetensors"))


def _layer_of(name: str) -> str:
    """Layer of vLLM's that holds a tensor with this public name."""
    parent, _, leaf = name.rpartition(".")[0].rpartition(".")
    return f"{parent}.{_FUSED.get(leaf, leaf)}" if parent else leaf


WeightTransferEngineFactory.register_engine("host", HostTransfer)
