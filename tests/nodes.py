"""Ray clusters of several nodes on this machine, and runs watched from outside."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster as RayCluster

from actors.deepspeed_setup import free_port

_QUICK_DEATHS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""A node that is gone is noticed within about two seconds instead of 30."""


class Nodes:
    """A head without room for actors and nodes that come and go.

    Every node needs ports of its own for the dashboard's agents: with a taken one a job submission
    fails with "No available agent".
    """

    def __init__(self) -> None:
        port = free_port()
        self.dashboard = f"http://127.0.0.1:{port}"
        self._ray = RayCluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": True,
                "dashboard_port": port,
                "_system_config": _QUICK_DEATHS,
                **_agent_ports(),
            },
        )
        self.address = self._ray.address

    def add(self, cpus: int) -> Any:
        """Start a node and wait until it is known."""
        return self._ray.add_node(num_cpus=cpus, **_agent_ports())

    def kill(self, node: Any) -> None:
        """Kill all of a node's processes at once."""
        self._ray.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        """Stop all nodes."""
        self._ray.shutdown()


def _agent_ports() -> dict[str, int]:
    return {
        "dashboard_agent_listen_port": free_port(),
        "metrics_agent_port": free_port(),
        "runtime_env_agent_port": free_port(),
    }


def wait_for(what: str, found: Callable[[], Any], seconds: float = 240) -> Any:
    """Wait until ``found`` gives something true, and return it."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return value


def living(run: Path, role: str) -> list[dict[str, Any]]:
    """Light actors of the role whose process runs and that have been ready for work."""
    lives = [json.loads(path.read_text()) for path in (run / "lives").glob(f"{role}-*.json")]
    return [life for life in lives if "ready" in life and _runs(life["pid"])]


def steps(run: Path) -> list[dict[str, Any]]:
    """Lines of the run's metrics so far."""
    path = run / "policy" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lasting(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics that a run without disturbances has too: no times, no counts of what happened."""
    return {key: value for key, value in metrics.items() if "second" not in key}


def write_whole(path: Path, text: str) -> None:
    """Write a file that others watch."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
