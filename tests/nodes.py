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
    """A head, by default without room for actors, and nodes that come and go.

    Every node needs ports of its own for the dashboard's agents: with a taken one a job submission
    fails with "No available agent".
    """

    def __init__(self, cpus: int = 0, **head: Any) -> None:
        """``head``: more parameters of the head; ``_system_config`` is added to."""
        port = free_port()
        self.dashboard = f"http://127.0.0.1:{port}"
        self._ray = RayCluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": cpus,
                "include_dashboard": True,
                "dashboard_port": port,
                **_agent_ports(),
                **head,
                "_system_config": _QUICK_DEATHS | head.get("_system_config", {}),
            },
        )
        self.address = self._ray.address

    def add(self, cpus: int) -> Any:
        """Start a node and wait until it is known."""
        return self._ray.add_node(num_cpus=cpus, **_agent_ports())

    def kill(self, node: Any) -> None:
        """Kill all of a node's processes at once."""
        self._ray.remove_node(node, allow_graceful=False)

    def kill_head(self) -> None:
        """Kill the head's processes at once; the other nodes have to find out."""
        self._ray.remove_node(self._ray.head_node, allow_graceful=False)

    def ids(self) -> set[str]:
        """Nodes that are alive."""
        return set(self._ray.global_state._live_node_ids())

    def workers(self, node: Any) -> set[int]:
        """Processes that the node's raylet has started."""
        (raylet,) = node.all_processes["raylet"]
        return {child.pid for child in psutil.Process(raylet.process.pid).children(recursive=True)}

    def processes(self) -> list[psutil.Process]:
        """All that runs on the nodes: Ray's own processes, workers, jobs with their drivers."""
        own = [
            psutil.Process(info.process.pid)
            for node in self._ray.list_all_nodes()
            for kind, infos in node.all_processes.items()
            for info in infos
            if kind != "reaper" and info.process.poll() is None
        ]
        return own + [child for process in own for child in process.children(recursive=True)]

    def stop(self) -> None:
        """Stop all nodes, also those that an autoscaler has started."""
        everything = self.processes()
        self._ray.shutdown()
        for process in filter(runs, everything):
            process.kill()


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
    return [life for life in lives if "ready" in life and _alive(life["pid"])]


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


def runs(process: psutil.Process) -> bool:
    """Whether the process has not ended, waited for or not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _alive(pid: int) -> bool:
    try:
        return runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False
