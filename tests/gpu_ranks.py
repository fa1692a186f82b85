"""A stand-in for reward training that notes the device of each rank, where no device is needed."""

import os
from types import SimpleNamespace
from typing import Any

import ray
from ray.train.torch import get_device
from torch import nn

from cluster.pipeline import reward_worker
from cluster.pipeline.reward_task import RewardTask


def note_devices(settings: dict[str, RewardTask]) -> None:
    """Start DeepSpeed as reward training does, with a DeepSpeed that notes what it is told."""
    task = settings["task"]
    seen: dict[str, Any] = {}

    def initialize(**_: Any) -> tuple[None, ...]:
        seen["local_rank"] = int(os.environ["LOCAL_RANK"])
        return (None,)

    deepspeed = SimpleNamespace(initialize=initialize, init_distributed=lambda *_, **__: None)
    reward_worker.import_deepspeed = lambda device: deepspeed
    reward_worker.make_optimizer = lambda *_: (None, None)
    engine = reward_worker._ZeroEngine(nn.Linear(1, 1), task.config, steps=1)
    seen["device"] = str(get_device())
    seen["visible"] = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    seen["given"] = [str(number) for number in ray.get_gpu_ids()]
    task.queue.put((task.kinds[0], engine.rank, engine.world_size, seen))
