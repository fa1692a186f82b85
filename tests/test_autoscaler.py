"""Engines without room make Ray's autoscaler add nodes, and engines that left let them go again.

The autoscaler is the one that a cluster of `ray up` has, with Ray's provider of nodes on one
machine. ``ray.cluster_utils.AutoscalingCluster`` would stop every Ray of this machine first, and
reads a file that Ray's wheels leave out.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from light_jobs import ROLES, assert_as_in_peace, python_first, settings, submit
from nodes import Nodes, living, steps, wait_for, write_whole
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from typer.testing import CliRunner

from actors.deepspeed_setup import free_port
from cluster.cli.main import app
from cluster.monitoring.ray_jobs import Jobs


def autoscaling(gcs: str) -> dict[str, Any]:
    """Up to two nodes with room for an engine each; they go when idle for three seconds."""
    head = {"resources": {"CPU": ROLES}, "node_config": {}, "max_workers": 0}
    engine = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    hooks = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
    return {
        "cluster_name": "fgaif",
        "max_workers": 2,
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {"ray.head.default": head, "engine": engine},
        "head_node_type": "ray.head.default",
        "auth": {},
        "cluster_synced_files": [],
        "file_mounts": {},
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{hook}_commands": [] for hook in (*hooks, "worker_start_ray")},
    }


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Nodes]:
    python_first(monkeypatch)
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    port, file = free_port(), tmp_path / "autoscaling.json"
    file.write_text(json.dumps(autoscaling(f"{ray.util.get_node_ip_address()}:{port}")))
    cluster = Nodes(
        cpus=ROLES,
        gcs_server_port=port,
        autoscaling_config=str(file),
        env_vars={"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID},
    )
    yield cluster
    cluster.stop()


@pytest.mark.long
def test_engines_without_room_get_nodes_and_idle_nodes_go(nodes: Nodes, tmp_path: Path) -> None:
    config = settings(tmp_path / "runs")
    run = config.run_dir
    run.mkdir(parents=True)
    write_whole(run / "until", "2")
    jobs = Jobs(nodes.dashboard)
    job = submit(jobs, config, tmp_path / "job")

    def engines() -> list[str]:
        """Nodes that the living engines are on."""
        assert not jobs.status(job).status.is_terminal(), jobs.logs(job)
        return sorted(life["node"] for life in living(run, "rollout"))

    def scale(count: int) -> None:
        result = CliRunner().invoke(app, ["scale", str(run), "--rollout", str(count)])
        assert result.exception is None, result.stdout

    wait_for("step 2", lambda: engines() and len(steps(run)) == 2)
    (head,) = engines()
    scale(3)
    wait_for("three engines", lambda: len(engines()) == 3)
    added = {node for node in engines() if node != head}
    assert len(added) == 2

    write_whole(run / "until", "4")
    wait_for("step 4", lambda: engines() and len(steps(run)) == 4)
    scale(1)
    wait_for("one engine", lambda: len(engines()) == 1)
    idle = added - set(engines())
    assert idle
    wait_for("idle nodes to go", lambda: not idle & nodes.ids())

    write_whole(run / "until", "100")
    print("".join(jobs.follow(job)))
    assert jobs.status(job).status == "SUCCEEDED"
    assert_as_in_peace(config, tmp_path / "here")
