"""Roles, their resources and their engines."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fgaif.config.section import Section, check_ranks_apart, check_single_gpu


class RoleConfig(Section):
    """Resources of one role."""

    replicas: int = Field(1, ge=1)
    """Actors of the role."""
    cpus: float = Field(1.0, ge=0)
    """CPUs that Ray reserves for each."""
    gpus: float = Field(0.0, ge=0)
    """GPUs that Ray reserves for each, or a fraction of one."""


class RewardRoleConfig(RoleConfig):
    """Scorers: an actor for each kind, or one for all."""

    shared: bool = False
    """One actor holds one backbone and the adapters of all kinds, which take turns: a third of the
    memory. The adapters are not merged then, so in bfloat16 scores differ by rounding."""


class AutoscaleConfig(Section):
    """Number of rollout engines by the length of their queue."""

    min: int = Field(1, ge=1)
    """Fewest engines."""
    max: int = Field(ge=1)
    """Most engines."""
    target_queue: float = Field(2.0, gt=0)
    """Chunks per engine and batch that are aimed at."""
    patience: int = Field(3, ge=1)
    """Batches in a row that must need fewer engines before any is let go."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(
                f"cluster.rollout.autoscale.min = {self.min} is above max = {self.max}: lower the "
                "first or raise the second"
            )
        return self


class RolloutRoleConfig(RoleConfig):
    """Rollout engines; `fgaif scale` changes their number while a run goes on."""

    chunk: int = Field(64, ge=1)
    """Responses that an engine is given at a time. Smaller ones spread better over engines that
    come and go, larger ones fill an engine better; not the number of engines but this decides
    which responses share a batch, so scaling does not change what is sampled."""
    autoscale: AutoscaleConfig | None = None
    """Follow the queue's length with the number of engines; default: keep it."""


class EngineConfig(Section):
    """vLLM settings."""

    max_num_seqs: int = Field(64, ge=1)
    """Responses that an engine samples at the same time."""
    max_model_len: int = Field(2048, ge=16)
    """Tokens of prompt, image and response together."""
    kv_cache_mib: int = Field(64, ge=1)
    """KV cache on CPU engines; on GPU, `gpu_memory_utilization` rules."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that an engine takes."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs over which an engine is spread."""
    sleep: bool = False
    """On a GPU the policy's engines keep their weights on the host and free their cache whenever
    they have nothing to sample (vLLM's sleep mode, level 1), so that what works meanwhile may use
    their memory: for one small GPU. Raise `rollout.chunk` with it, each chunk wakes them."""
    enforce_eager: bool = True
    """Without CUDA graphs: less memory, a quicker start, slower."""
    adapters: Literal["auto", "merged", "unmerged"] = "auto"
    """How engines hold the policy's LoRA adapter: `merged` adds it to the weights, which is faster,
    and in bfloat16 rounds small updates away; `unmerged` serves it beside them, as vLLM does with
    LoRA requests, and loses nothing. `auto` merges in float32 only."""


class ClusterConfig(Section):
    """Roles and where they run."""

    address: str | None = None
    """Ray address; default: the cluster this process belongs to, else a local one."""
    local_cpus: int | None = Field(None, ge=1)
    """CPUs of a local Ray; default: all."""
    rollout: RolloutRoleConfig = RolloutRoleConfig()
    reward: RewardRoleConfig = RewardRoleConfig()
    """Resources of each kind's reward actor, or of the shared one."""
    reference: RoleConfig = RoleConfig()
    learner: RoleConfig = RoleConfig()
    """`replicas` is the number of DeepSpeed ranks."""
    layout: Literal["separate", "shared"] = "separate"
    """`separate`: every role is an actor with models of its own. `shared`: the `shared_roles` live
    in one process on one copy of the base's weights, each with its own adapter and optimiser: for
    one GPU. On a GPU they take turns. Such a process has the CPUs of its roles together and the
    largest of their shares of a GPU; there is one for each rank of the learner."""
    shared_roles: tuple[Literal["learner", "reference", "reward"], ...] = (
        "learner",
        "reference",
        "reward",
    )
    """Which roles the shared process holds, two or three."""
    judge: RoleConfig = RoleConfig()
    engine: EngineConfig = EngineConfig()
    threads: int = Field(1, ge=1)
    """OMP threads of each actor on CPU."""
    max_restarts: int = Field(5, ge=0)
    """Times in a row that an actor is replaced when it dies or hangs, without having answered in
    between; the run stops after that."""
    heartbeat_s: float = Field(5.0, gt=0)
    """Time between two heartbeats of an actor's process."""
    heartbeat_timeout_s: float = Field(60.0, gt=0)
    """An actor without a heartbeat for so long is frozen, and is replaced."""
    stall_timeout_s: float = Field(900.0, gt=0)
    """An actor at work that makes no progress for so long hangs, and is replaced."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Time that an actor has to load its model."""
    call_timeout_s: float = Field(3600.0, gt=0)
    """Time that a call of an actor may take before it counts as hanging."""

    @model_validator(mode="after")
    def _roles_share(self) -> Self:
        if self.layout == "separate":
            return self
        names = self.shared_roles
        if len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(
                f"cluster.shared_roles = {list(names)}: names two or three different roles; for "
                "each in a process of its own set cluster.layout=separate"
            )
        gpus = {name: getattr(self, name).gpus for name in names}
        if 0 < sum(found > 0 for found in gpus.values()) < len(gpus):
            without = next(name for name, found in gpus.items() if found == 0)
            raise ValueError(
                f"cluster.layout = 'shared' with {gpus} GPUs: a process is on the CPU or on a GPU: "
                f"set cluster.{without}.gpus={max(gpus.values()):g}, or all of them to 0"
            )
        for name in {"reference", "reward"} & set(names):
            if getattr(self, name).replicas > 1:
                raise ValueError(
                    f"cluster.{name}.replicas = {getattr(self, name).replicas} with cluster.layout "
                    f"= 'shared': there are as many processes as ranks of the learner: set "
                    f"cluster.{name}.replicas=1, and cluster.learner.replicas for more"
                )
        return self

    @model_validator(mode="after")
    def _actors_fit_gpus(self) -> Self:
        for name in ("reward", "reference", "learner"):
            key = f"cluster.{name}"
            check_single_gpu(f"{key}.gpus", getattr(self, name).gpus, f"{key}.replicas")
        learner, width = self.learner, self.engine.tensor_parallel
        check_ranks_apart(
            "cluster.learner.gpus", learner.gpus, "cluster.learner.replicas", learner.replicas
        )
        for name in ("rollout", "judge"):
            gpus = getattr(self, name).gpus
            if gpus > 0 and (gpus != width if width > 1 else gpus > 1):
                raise ValueError(
                    f"cluster.{name}.gpus = {gpus:g} with cluster.engine.tensor_parallel = {width}:"
                    f" an engine takes as many GPUs: set cluster.{name}.gpus={width}"
                    + (" (or a fraction, to share one)" if width == 1 else "")
                    + f" or another tensor_parallel; more engines are cluster.{name}.replicas"
                )
        return self
