"""How DeepSpeed is set up here: environment, process group, and the one configuration dict."""

import os
import socket
from types import ModuleType
from typing import Any, Literal

import torch

ZeroStage = Literal[0, 1, 2, 3]
ZERO_BUCKET = 500_000_000
"""Elements of ZeRO's reduction bucket at most: DeepSpeed's default."""


def import_deepspeed(device: str) -> ModuleType:
    """Import DeepSpeed for ``"cpu"`` or ``"cuda"`` without compiling anything on the CPU.

    DeepSpeed's CPU back end builds a shared-memory kernel at first use (about 30 s of g++). Only
    its inference all-reduce calls that kernel; training communicates through gloo. So its compiled
    operators are declared incompatible before the back end asks for them.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    if device == "cpu":
        deepspeed.ops.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)
    return deepspeed


def join_process_group(
    deepspeed: ModuleType, *, device: str, rank: int, world_size: int, addr: str, port: int
) -> None:
    """Join the ranks' process group: gloo on the CPU, NCCL on GPUs.

    Ranks meet at ``addr`` and ``port``; one alone needs neither. A group that exists already (Ray
    Train makes one) is used as it is. DeepSpeed reads rank and world size from the environment in
    places, so they are put there too.

    ``device`` is the one this rank was given, among those it sees: ``"cuda"``, the first, where Ray
    shows an actor its own alone; ``"cuda:1"`` and so on where it shows all of a node's, as Ray
    Train does. DeepSpeed's "local rank" is that number and nothing else.
    """
    place = torch.device(device)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(place.index or 0),
        MASTER_ADDR=addr,
        MASTER_PORT=str(port),
    )
    backend = "nccl" if place.type == "cuda" else "gloo"
    if world_size == 1 and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    elif not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend, init_method=f"tcp://{addr}:{port}", rank=rank, world_size=world_size
        )
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def deepspeed_config(
    *,
    zero_stage: ZeroStage,
    micro_batch: int,
    max_grad_norm: float,
    dtype: str,
    trained: int,
    world_size: int = 1,
) -> dict[str, Any]:
    """Build DeepSpeed's configuration dict for a torch optimiser that the caller passes in.

    ZeRO sets its reduction bucket aside whole. All gradients of an adapter fit into one, so it has
    room for the ``trained`` parameters: the same reductions as with DeepSpeed's default, without
    the gigabyte or two that the default takes on a GPU.

    Accumulation is 1 because callers mark the last backward of an optimiser step themselves
    (``engine.set_gradient_accumulation_boundary``): minibatches need not cut evenly.
    """
    return {
        "train_batch_size": micro_batch * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(trained, ZERO_BUCKET),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def free_port() -> int:
    """Ask the system for a TCP port that is free now, for a new process group."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside an engine, with or without a ZeRO wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def master_tensors(engine: Any) -> list[torch.Tensor]:
    """The float32 tensors this rank's optimiser steps: parameters, or its flat partitions."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if partitions is not None:  # ZeRO-3 hands them to the optimiser only during a step
        return list(partitions)
    groups = torch_optimizer(engine).param_groups
    return [parameter for group in groups for parameter in group["params"]]
