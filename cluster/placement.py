"""Pure placement plan: roles to bundles with CPUs, GPUs and memory, checked before any start."""

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rich.table import Table

from fgaif.config import Config, LoraConfig, RoleConfig
from fgaif.errors import CheckpointError, ConfigError
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.types import KINDS

Role = Literal["rollout", "reward", "reference", "learner", "judge"]
ROLES: tuple[Role, ...] = get_args(Role)
_GIB = 2**30
_PROCESS_GIB = {"rollout": 0.9, "reward": 0.6, "reference": 0.6, "learner": 0.8, "judge": 0.9}
"""Resident memory of an idle process of the role: interpreter, torch and, for engines, vLLM."""
_TRAINED_BYTES = 16
"""Per trained parameter: fp32 weight, gradient and two Adam moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """One actor: what it asks of a node. ``memory_gib`` is device memory where it has a GPU."""

    role: Role
    name: str
    cpus: float
    gpus: float
    memory_gib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Parameters of a checkpoint and of what LoRA would add to it."""

    parameters: int
    linear_shapes: tuple[tuple[int, int], ...]

    def lora_parameters(self, lora: LoraConfig) -> int:
        """Trainable parameters of an adapter of this rank on the language model's linears."""
        return sum(lora.r * (rows + columns) for rows, columns in self.linear_shapes)


def model_size(path: Path) -> ModelSize:
    """Count parameters from the safetensors headers, without reading weights."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: item["shape"] for name, item in header.items() if name != "__metadata__"}
    if not shapes:
        raise CheckpointError(f"{path}: no *.safetensors weights; pickled weights are not loaded")
    count = 0
    for shape in shapes.values():
        size = 1
        for side in shape:
            size *= side
        count += size
    linears = tuple(
        (shape[0], shape[1])
        for name, shape in shapes.items()
        if "language_model" in name and len(shape) == 2 and "_proj" in name
    )
    return ModelSize(parameters=count, linear_shapes=linears)


def plan_roles(config: Config, roles: Collection[Role] = ROLES) -> tuple[Bundle, ...]:
    """Plan the actors of these roles, one bundle each (the judge runs only while annotating, and
    only where the verifier is a checkpoint)."""
    cluster = config.cluster
    judges = cluster.judge.replicas if config.feedback.local_verifier is not None else 0
    wanted: list[tuple[Role, RoleConfig, tuple[str, ...]]] = [
        ("rollout", cluster.rollout, _names("rollout", cluster.rollout.replicas)),
        *(
            ("reward", cluster.reward, _names(prefix, cluster.reward.replicas))
            for prefix in (
                ("reward",) if cluster.reward.shared else [f"reward-{kind}" for kind in KINDS]
            )
        ),
        ("reference", cluster.reference, _names("reference", cluster.reference.replicas)),
        ("learner", cluster.learner, _names("learner", cluster.learner.replicas)),
        ("judge", cluster.judge, _names("judge", judges)),
    ]
    planned = [item for item in wanted if item[0] in roles and item[2]]
    need = {role: _memory_gib(config, role) for role in dict.fromkeys(item[0] for item in planned)}
    return tuple(
        Bundle(role=role, name=name, cpus=each.cpus, gpus=each.gpus, memory_gib=need[role])
        for role, each, names in planned
        for name in names
    )


def _names(prefix: str, replicas: int) -> tuple[str, ...]:
    return tuple(f"{prefix}-{index}" for index in range(replicas))


def _memory_gib(config: Config, role: Role) -> float:
    """About what one actor of a role holds: process, weights, and what it trains or caches."""
    width = 2 if config.policy.dtype == "bfloat16" else 4
    names = {"reward": config.reward_backbone, "judge": config.feedback.local_verifier}
    model = model_size(resolve_checkpoint(names.get(role) or config.policy.model))
    parameters, extra = model.parameters, 0.0
    if role in ("rollout", "judge"):
        extra = config.cluster.engine.kv_cache_mib / 1024
    elif role == "reward":
        adapters = len(KINDS) if config.cluster.reward.shared else 1
        parameters += adapters * model.lora_parameters(config.reward.lora)
    elif role == "reference":
        extra = model.lora_parameters(config.ppo.value_lora) * _TRAINED_BYTES / _GIB
    else:
        extra = model.lora_parameters(config.policy.lora) * _TRAINED_BYTES / _GIB
        extra += _activation_gib(config, model)
    return _PROCESS_GIB[role] + parameters * width / _GIB + extra


def check_fits(bundles: Sequence[Bundle], available: Mapping[str, float]) -> None:
    """Refuse a plan that the cluster can never place, before anything pends.

    PPO's roles must fit together; the judge, which runs before them, must fit beside the rollout.

    Raises:
        ConfigError: names the resource, what is needed and what there is.
    """
    together = (
        [bundle for bundle in bundles if bundle.role != "judge"],
        [bundle for bundle in bundles if bundle.role in ("rollout", "judge")],
    )
    for members in together:
        roles = dict.fromkeys(bundle.role for bundle in members)
        for resource, need in (
            ("CPU", sum(bundle.cpus for bundle in members)),
            ("GPU", sum(bundle.gpus for bundle in members)),
        ):
            have = available.get(resource, 0.0)
            if need > have + 1e-6:
                keys = ", ".join(f"cluster.{role}" for role in roles)
                raise ConfigError(
                    f"{', '.join(roles)}: needs {need:g} {resource}s but the cluster has {have:g}: "
                    f"lower the {resource.lower()}s or replicas in {keys}, or add nodes"
                )


def plan_table(bundles: Sequence[Bundle]) -> Table:
    """Render the plan: role, replicas, CPUs, GPUs and estimated memory of each actor."""
    table = Table(title="placement: one placement group per actor", title_justify="left")
    for column in ("actor", "CPUs", "GPUs", "memory (GiB, estimate)", "where"):
        table.add_column(column, justify="left" if column in ("actor", "where") else "right")
    for bundle in bundles:
        where = "GPU" if bundle.gpus else "host"
        table.add_row(
            bundle.name, f"{bundle.cpus:g}", f"{bundle.gpus:g}", f"{bundle.memory_gib:.1f}", where
        )
    total = [sum(getattr(bundle, key) for bundle in bundles) for key in ("cpus", "gpus")]
    memory = sum(bundle.memory_gib for bundle in bundles)
    table.add_section()
    table.add_row("all", f"{total[0]:g}", f"{total[1]:g}", f"{memory:.1f}", "")
    return table


def _activation_gib(config: Config, policy: ModelSize) -> float:
    """Rough activations of one micro-batch: 34 bytes per token, layer and hidden unit."""
    if not policy.linear_shapes:
        return 0.0
    hidden = min(min(shape) for shape in policy.linear_shapes)
    layers = len(policy.linear_shapes) / 7
    tokens = config.ppo.micro_batch * (config.policy.max_new_tokens + 640)
    per_layer = 2 if config.policy.gradient_checkpointing else 34
    return tokens * hidden * layers * per_layer / _GIB
