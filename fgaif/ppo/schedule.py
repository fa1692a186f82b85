"""Learning rate over PPO steps."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine"]


def lr_factor(step: int, *, steps: int, warmup: int, schedule: Schedule) -> float:
    """Factor on the configured learning rate at a PPO step, one value per rollout batch.

    Rises linearly over the first ``warmup`` steps, (step + 1) / warmup, then stays at 1 or falls
    as half a cosine, so that the step after the last would have factor 0.

    Args:
        step: finished steps before this one, from 0.
        steps: steps of the whole run.
        warmup: steps of the rise.
        schedule: what follows the rise.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
