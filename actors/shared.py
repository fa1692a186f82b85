"""Several roles in one process, on one copy of the base model's weights."""

import threading
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from actors.learner import LearnerActor
from actors.reference import ReferenceActor
from actors.reward import SharedRewardActor
from actors.settings import SharedSettings
from fgaif.lvlm.shared import BaseModels


class SharedActor:
    """One of N processes that hold the same roles: rank ``rank`` of the learner, the reward models
    of all kinds, and in the first process the reference and value model.

    Each role is what it is in a process of its own; only the weights of the base, and the image
    features, are there once. On the CPU roles may be called at the same time, in threads. On a GPU
    they take turns: side by side each would be slower, and would need its memory at the same time.
    """

    def __init__(
        self,
        config: SharedSettings,
        roles: Collection[str],
        rewards: Path,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
    ) -> None:
        """Start the roles; ``rewards`` holds the trained reward models by kind."""
        models = BaseModels()
        self._roles: dict[str, Any] = {}
        if "learner" in roles:
            self._roles["learner"] = LearnerActor(
                config, rank, world_size, master_addr, master_port, models
            )
        if "reference" in roles and rank == 0:
            self._roles["reference"] = ReferenceActor(config, rewards, models)
        if "reward" in roles:
            self._roles["reward"] = SharedRewardActor(rewards, config, models)
        on_gpu = any(getattr(config.cluster, role).gpus > 0 for role in roles)
        self._turn = threading.Lock() if on_gpu else nullcontext()
        self._on_gpu = on_gpu

    def call(self, role: str, method: str, *arguments: Any) -> Any:
        """Call a method of a role."""
        if not self._on_gpu:
            torch.set_flush_denormal(True)  # as load_lvlm does, which counts for one thread alone
        with self._turn:
            return getattr(self._roles[role], method)(*arguments)
