"""A run on a Ray cluster of several nodes: submitted as a job, scaled, and hit in mid-step.

Nodes are real Ray nodes on this machine; driver, groups, placement, weight sync and recovery are
the product's; the actors are light ones, whose policy is an integer that every answer moves.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from light_jobs import ROLES, assert_as_in_peace, python_first, settings, submit
from nodes import Nodes, living, steps, wait_for, write_whole

from cluster.monitoring.heartbeat import NAMESPACE, store_name
from cluster.monitoring.ray_jobs import Jobs


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    python_first(monkeypatch)
    cluster = Nodes()
    yield cluster
    ray.shutdown()
    cluster.stop()


@pytest.mark.long
@pytest.mark.parametrize("estimator", ["gae", "token_grpo"])
def test_a_job_outlives_scaling_and_the_loss_of_nodes_and_ends_the_same(
    nodes: Nodes, tmp_path: Path, estimator: str
) -> None:
    size = 1 if estimator == "gae" else 4
    of_ppo = [f"ppo.estimator={estimator}", f"ppo.samples_per_prompt={size}"]
    config = settings(tmp_path / "cluster", *of_ppo)
    run = config.run_dir
    run.mkdir(parents=True)
    first = nodes.add(cpus=ROLES)
    jobs = Jobs(nodes.dashboard)
    write_whole(run / "until", "2")  # so far it goes with one engine
    job = submit(jobs, config, tmp_path / "job")

    def engines(count: int) -> bool:
        details = jobs.status(job)
        assert not details.status.is_terminal(), jobs.logs(job)
        return len(living(run, "rollout")) == count

    def reached(step: int) -> None:
        wait_for(f"step {step}", lambda: engines(-1) or len(steps(run)) >= step)

    reached(2)
    assert engines(1)

    second = nodes.add(cpus=2)
    ray.init(address=nodes.address, namespace=NAMESPACE, log_to_driver=False)
    store = ray.get_actor(store_name(config))
    ray.get(store.request_rollouts.remote(3))
    wait_for("three engines", lambda: engines(3))
    assert sum(life["node"] == second.node_id for life in living(run, "rollout")) == 2

    held = run / "held"
    write_whole(run / "hold", second.node_id)
    write_whole(run / "until", "4")
    wait_for("work on the second node", lambda: held.exists() and len(list(held.iterdir())) == 2)
    nodes.kill(second)
    (run / "hold").unlink()
    reached(4)
    assert engines(1)  # the others have no room

    third = nodes.add(cpus=2)
    wait_for("three engines", lambda: engines(3))
    ray.get(store.request_rollouts.remote(1))
    wait_for("one engine", lambda: engines(1))

    shutil.rmtree(held)
    fourth = nodes.add(cpus=ROLES)
    write_whole(run / "hold", living(run, "rollout")[0]["node"])
    write_whole(run / "until", "100")
    wait_for("work on the engine's node", lambda: held.exists() and any(held.iterdir()))
    nodes.kill(first)  # learner, value model and reward models are on it
    (run / "hold").unlink()
    print("".join(jobs.follow(job)))
    assert jobs.status(job).status == "SUCCEEDED"
    del third, fourth

    assert_as_in_peace(config, tmp_path / "here")
