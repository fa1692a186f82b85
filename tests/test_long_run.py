"""Two hundred steps on a real Ray: neither the object store nor what the driver holds grows."""

import gc
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import light_actors
import nodes_job
import pytest
import ray
from ray._private.internal_api import node_stats
from ray._private.worker import global_worker

from cluster.driver import PpoData, PpoDriver
from cluster.launch import Cluster
from cluster.pipeline.keys import stage_values
from cluster.pipeline.stage_status import check_resumable
from fgaif.config import Config, load_config

EVERY = 10  # steps between checkpoints, which let go of the updates kept for a replay
_FREED_S = 2.0  # Ray's store frees what nobody refers to once a second


class Held(NamedTuple):
    """Objects in the node's store, their bytes, and references that this process holds."""

    objects: int
    octets: int
    references: int

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        time.sleep(_FREED_S)
        node = ray.nodes()[0]
        store = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
        references = global_worker.core_worker.get_all_reference_counts()
        return cls(store.num_local_objects, store.object_store_bytes_used, len(references))


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for role in nodes_job.ROLES:  # put back what is there now
        monkeypatch.setitem(sys.modules, f"actors.{role}", ModuleType(role))
    nodes_job.stand_in()
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env=here, object_store_memory=256 * 2**20,
    )  # fmt: skip
    yield
    ray.shutdown()


def settings(folder: Path) -> Config:
    return load_config(
        None,
        [
            f"dir={folder}", "name=long", "ppo.steps=200", "ppo.rollout_batch=4", "ppo.minibatch=4",
            f"ppo.checkpoint_every={EVERY}", "ppo.async_depth=1", "policy.max_new_tokens=2",
            "cluster.rollout.replicas=2", "cluster.rollout.chunk=1",
            *(f"cluster.{role}.cpus=0.1" for role in nodes_job.ROLES),
        ],
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_two_hundred_steps_leave_nothing_behind(tmp_path: Path) -> None:
    config = settings(tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "pace").write_text("0")
    held: dict[int, Held] = {}
    with Cluster(config, nodes_job.ROLES) as cluster:
        roles = nodes_job.roles_on(cluster, config)
        data = PpoData(
            prompts=nodes_job.make_prompts(1000),
            anchors=[],
            digest="light",
            settings=stage_values(config, "train"),
            check_resumable=partial(check_resumable, config),
        )
        driver = PpoDriver(config, roles, data, light_actors.segments, lambda *_: ())
        for report in driver.run():
            if report.step in (5 * EVERY, config.ppo.steps):
                held[report.step] = Held.now()
    assert len(os.listdir(config.run_dir / "trained")) == 200
    early, late = held[50], held[200]
    # One object, or one reference, left by every step would be 150 more.
    assert late.objects <= early.objects + 20, held
    assert late.references <= early.references + 20, held
    assert late.octets <= early.octets + 100_000, held
