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

Engines that serve adapters unmerged take only the whole weights this way; see
``actors/served_adapter.py`` for the factors.
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
from fgaif.lvlm.arrival import factor_sums, lora_update, merged_sums
from fgaif.lvlm.families import family_of
from fgaif.lvlm.families.base import Family
from fgaif.lvlm.weights import split_tensors, tensor_name

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
    model_runner: Any

    def weights_problems(self, shapes: dict[str, list[int]], unmerged: bool) -> list[str]:
        """What keeps tensors of these shapes, by manifest name, from being loaded."""
        problems: list[str] = self.weight_transfer_engine.problems(shapes)
        if unmerged:
            whole, factors = split_tensors(shapes)
            problems += [
                f"{name}: an engine that serves adapters unmerged takes no whole weights of the "
                "language model"
                for name in whole
                if self.weight_transfer_engine.family.is_language(name)
            ]
            slot = self._lora.lora_config.max_lora_rank
            problems += [
                f"{module}: rank {pair['lora_A'][0]}, the engine has room for {slot}; set "
                "policy.lora.r to the adapter's"
                for module, pair in factors.items()
                if pair.get("lora_A", [0])[0] > slot
            ]
        return problems

    def merged_sums(self) -> dict[str, tuple[float, float]]:
        """Per layer how much of the update that was last merged survived the rounding."""
        sums: dict[str, tuple[float, float]] = self.weight_transfer_engine.sums
        return sums

    @torch.no_grad()
    def served_sums(self, folder: str, adapter: int) -> dict[str, tuple[float, float]]:
        """Per layer how much of the adapter in ``folder`` lies in the slot of request ``adapter``.

        Read from the tensors that the forward pass multiplies with, so a layer that vLLM left out
        counts as nothing. A sharded engine's workers each compare their own part.
        """
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        scaling = config["lora_alpha"] / config["r"]
        slot = self._lora.lora_index_to_id.index(adapter)
        sums = {}
        with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
            tensors = {tensor_name(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for module, pair in split_tensors(tensors)[1].items():
            a, b = pair["lora_A"], pair["lora_B"]
            layer = self.weight_transfer_engine.layer_of(f"{module}.weight")
            sums[module] = self._served(module, layer, a, b, slot, scaling)
        return sums

    def _served(
        self, name: str, place: str, a: Tensor, b: Tensor, slot: int, scaling: float
    ) -> tuple[float, float]:
        layer = self._lora.modules.get(place)
        if layer is None:
            zero = torch.zeros(())
            return factor_sums(a, b, zero.expand(a.shape), zero.expand(b.shape), scaling)
        leaf = name.rpartition(".")[2]
        members = [key for key, fused in _FUSED.items() if fused == _FUSED.get(leaf)]
        part = members.index(leaf) if members else 0
        if layer.tp_size > 1:
            a, b = (
                _slice(cut, value, part, len(members))
                for cut, value in ((layer.slice_lora_a, a), (layer.slice_lora_b, b))
            )
        held_a = layer.lora_a_stacked[part][slot, 0, :, : a.shape[1]]
        held_b = layer.lora_b_stacked[part][slot, 0, : b.shape[0]]
        return factor_sums(a.to(held_a.device), b.to(held_b.device), held_a, held_b, scaling)

    @property
    def _lora(self) -> Any:
        """vLLM's manager of the adapters in this worker."""
        return self.model_runner.lora_manager._adapter_manager


def _slice(cut: Any, value: Tensor, part: int, members: int) -> Tensor:
    """This worker's part of a factor, cut as vLLM cuts it."""
    if not members:
        return cut(value)
    whole: list[Tensor | None] = [None] * members
    whole[part] = value
    return cut(whole)[part]


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
        self.family: Family = family_of(self.model_config.hf_config)
        self._checkpoint = _Checkpoint(Path(self.model_config.model), self.family)
        self._incoming: dict[str, Tensor] = {}
        self._scaling = 1.0
        self._changed: set[str] = set()
        self.sums: dict[str, tuple[float, float]] = {}
        """Per layer ``<held - W0, D>`` and ``<D, D>`` of the update D last merged."""

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
        public = self.family.public_name
        whole = {public(name): value for name, value in full.items()}
        updates = {f"{public(module)}.weight": pair for module, pair in factors.items()}
        named = {self._layer(name) for name in [*whole, *updates]}
        layers = sorted(named | self._changed)
        self.sums = {}
        modules = dict(self.model.named_modules())
        # The engine leaves out layers that it has no use for, such as the vision tower's last.
        reloaded = [modules[layer] for layer in layers if layer in modules]
        for module in reloaded:
            initialize_layerwise_reload(module)
        self.model.load_weights(self._values(layers, whole, updates))
        for module in reloaded:
            finalize_layerwise_reload(module, self.model_config)
        self._changed, self._incoming = named, {}

    def layer_of(self, name: str) -> str:
        """Layer of vLLM's that holds the parameter of this name in memory."""
        return self._layer(self.family.public_name(name))

    def _layer(self, public: str) -> str:
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)  # some models' names are vLLM's
        mapped = None if mapper is None else mapper.map_name(public)
        return _fused(public if mapped is None else mapped)

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
        members: dict[str, list[str]] = {}
        for name in self._checkpoint.shapes:
            members.setdefault(self._layer(name), []).append(name)
        for name in (name for layer in layers for name in members[layer]):
            value = whole[name] if name in whole else self._checkpoint[name]
            value = value.to(self.device, dtype)
            if name in updates:
                a, b = (updates[name][key].to(self.device) for key in ("lora_A", "lora_B"))
                update, base = lora_update(a, b, self._scaling), value
                value = (base.float() + update).to(dtype)
                self.sums[name] = merged_sums(base, value, update)
            yield name, value

    def _check(self, name: str, shape: tuple[int, ...]) -> str | None:
        try:
            expected = self._checkpoint.shapes.get(self.family.public_name(name))
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
        if problem is None and not self.family.is_language(module):
            return f"{module}: LoRA factors outside the language model"
        return problem


class _Checkpoint:
    """A checkpoint's tensors by public name, read when first asked for and kept on the host."""

    def __init__(self, directory: Path, family: Family) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._kept: dict[str, Tensor] = {}
        for path in _weight_files(directory):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    name = family.public_of_file(key)
                    self.shapes[name] = tuple(file.get_slice(key).get_shape())
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


def _fused(name: str) -> str:
    """Layer of vLLM's that holds a tensor with this name, before what vLLM fuses is fused."""
    parent, _, leaf = name.rpartition(".")[0].rpartition(".")
    return f"{parent}.{_FUSED.get(leaf, leaf)}" if parent else leaf


WeightTransferEngineFactory.register_engine("host", HostTransfer)
