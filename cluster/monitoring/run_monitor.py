"""A run in the open: its board, what its driver sees there, and what it publishes."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import ray

from cluster.monitoring.heartbeat import NAMESPACE, Watch, board_name, log_to, start_board
from cluster.monitoring.metrics import Exporter
from cluster.monitoring.status import ActorStatus, Publisher, RunState, write_live
from fgaif.config import Config
from fgaif.types import StepReport


class LiveRun:
    """Board, watch, status and metrics of a run, from when Ray is connected until it ends.

    Raises:
        ActorError: another driver works on the same run folder.
    """

    def __init__(self, config: Config, others: Callable[[], Sequence[ActorStatus]]) -> None:
        """``others`` gives the actors besides rollout engines whenever a status is published."""
        context = ray.get_runtime_context()
        self._board = start_board(config)
        with ExitStack() as undo:
            undo.callback(ray.kill, self._board)
            self._exporter = Exporter(config.name)
            self.watch = Watch.of(self._board, config.cluster)
            self.publisher = Publisher(config, [self._board.put.remote, self._exporter.status])
            self.publisher.listen(self.watch.signs, others)
            write_live(
                config,
                address=context.gcs_address,
                namespace=NAMESPACE,
                board=board_name(config),
                job=context.get_job_id(),
            )
            self._log = log_to(config.run_dir / "logs" / "driver.log")
            undo.pop_all()

    def hooks(self) -> dict[str, Any]:
        """What the rollout engines' group listens to and tells."""
        return {
            "watch": self.watch,
            "wished": self.watch.wished,
            "tell": self.publisher.rollouts,
        }

    def step(self, report: StepReport) -> None:
        """Publish a finished step."""
        self._exporter.step(report)
        self.publisher.step(report)

    def close(self, error: type[BaseException] | None) -> None:
        """Publish how the run ended, and take the board down; after all actors have stopped."""
        state: RunState = "ended" if error is None else "failed"
        self.publisher.close("interrupted" if error is KeyboardInterrupt else state)
        ray.kill(self._board)
        if self._log:
            logging.getLogger().removeHandler(self._log)
            self._log.close()
