"""A stand-in for reward training that notes the device of each rank, where no device is needed."""

import os
from types import SimpleNamespace
from typing import Any

import ray
from ray.train.torch import get_device
from torch import nn

from cluster.pipeline import reward_worker
from cluster.pipeline.reward_task import Lane


def note_devices(settings: dict[str, Lane]) -> None:
    """Start DeepSpeed as reward training does, with a DeepSpeed that notes what it is told."""
    lane = settings["lane"]
    seen: dict[str, Any] = {}

    def initialize(**_: Any) -> tuple[None, ...]:
        seen["local_rank"] = int(os.environ["LOCAL_RANK"])
        return (None,)

    deepspeed = SimpleNamespace(initialize=initialize, init_distributed=lambda *_, **__: None)
    reward_worker.import_deepspeed = lambda device: deepspeed
    reward_worker.make_optimizer = lambda *_: (None, None)
    engine = reward_worker._ZeroEngine(nn.Linear(1, 1), lane.config, steps=1)
    seen["device"] = str(get_device())
    seen["visible"] = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    seen["given"] = [str(number) for number in ray.get_gpu_ids()]
    lane.queue.put((lane.kinds[0], engine.rank, engine.world_size, seen))
