"""Learner and reference that kill their own process in the middle of an update when told to."""

import os
import signal
from pathlib import Path
from typing import Any

import actors.shared
from actors.learner import LearnerActor
from actors.reference import ReferenceActor
from fgaif.config import Config

_STEPS = 2  # optimiser steps of the update that are done when the process dies


def doom(run_dir: Path, name: str) -> None:
    """Have ``learner-RANK`` or ``reference`` die in its next update, once."""
    (run_dir / f"doom.{name}").touch()


def _kill_at(run_dir: Path, name: str, steps: int) -> None:
    order = run_dir / f"doom.{name}"
    if steps == _STEPS and order.exists():
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class DoomedLearner(LearnerActor):
    """Dies after two of the optimiser steps of an update."""

    def __init__(self, config: Config, rank: int, *meeting: Any) -> None:
        super().__init__(config, rank, *meeting)
        take_step, self._taken = self._engine.step, 0

        def step(*arguments: Any) -> float:
            _kill_at(config.run_dir, f"learner-{rank}", self._taken)
            self._taken += 1
            return take_step(*arguments)

        self._engine.step = step  # type: ignore[method-assign]

    def update(self, *arguments: Any) -> Any:
        self._taken = 0
        return super().update(*arguments)


class DoomedReference(ReferenceActor):
    """Dies after two of the optimiser steps of an update of the values."""

    def update_values(self, *arguments: Any) -> Any:
        self._taken = 0
        return super().update_values(*arguments)

    def _minibatch(self, *arguments: Any) -> tuple[float, float]:
        _kill_at(self._config.run_dir, "reference", self._taken)
        self._taken += 1
        return super()._minibatch(*arguments)


class DoomedShared(actors.shared.SharedActor):
    """The two in one process."""

    def __init__(self, *arguments: Any) -> None:
        actors.shared.LearnerActor = DoomedLearner  # type: ignore[misc]
        actors.shared.ReferenceActor = DoomedReference  # type: ignore[misc]
        super().__init__(*arguments)
