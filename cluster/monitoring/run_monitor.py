"""Monitoring of one run, on the driver's side: its heartbeat store, its status and its metrics."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import ray

from cluster.monitoring.heartbeat import (
    NAMESPACE,
    HeartbeatMonitor,
    log_to,
    start_heartbeat_store,
    store_name,
)
from cluster.monitoring.metrics import MetricsExporter
from cluster.monitoring.status import ActorStatus, RunState, StatusPublisher, write_run_address
from fgaif.config import Config
from fgaif.types import StepReport


class RunMonitor:
    """Heartbeats, status and metrics of a run, from when Ray is connected until it ends.

    Raises:
        ActorError: another driver works on the same run folder.
    """

    def __init__(self, config: Config, others: Callable[[], Sequence[ActorStatus]]) -> None:
        """``others`` gives the actors besides rollout engines whenever a status is published."""
        context = ray.get_runtime_context()
        self._store = start_heartbeat_store(config)
        with ExitStack() as undo:
            undo.callback(ray.kill, self._store)
            self._exporter = MetricsExporter(config.name)
            self.watch = HeartbeatMonitor.of(self._store, config.cluster)
            self.publisher = StatusPublisher(
                config, [self._store.put.remote, self._exporter.status]
            )
            self.publisher.listen(self.watch.heartbeats, others)
            write_run_address(
                config,
                address=context.gcs_address,
                namespace=NAMESPACE,
                store=store_name(config),
                job=context.get_job_id(),
            )
            self._log = log_to(config.run_dir / "logs" / "driver.log")
            undo.pop_all()

    def hooks(self) -> dict[str, Any]:
        """What the rollout engines' group listens to and tells."""
        return {
            "watch": self.watch,
            "wished": self.watch.wished,
            "report": self.publisher.rollouts,
        }

    def step(self, report: StepReport) -> None:
        """Publish a finished step."""
        self._exporter.step(report)
        self.publisher.step(report)

    def close(self, error: type[BaseException] | None) -> None:
        """Publish how the run ended, and stop the store; after all actors have stopped."""
        state: RunState = "ended" if error is None else "failed"
        self.publisher.close("interrupted" if error is KeyboardInterrupt else state)
        ray.kill(self._store)
        if self._log:
            logging.getLogger().removeHandler(self._log)
            self._log.close()
