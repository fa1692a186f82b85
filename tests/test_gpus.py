"""Who uses which GPU: Ray's fake ones stand for devices, so nothing is computed on them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from gpu_ranks import note_devices
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from cluster.pipeline import train_rewards
from cluster.pipeline.reward_task import RewardTask
from fgaif.config import load_config
from fgaif.errors import ConfigError
from fgaif.types import DEFAULT_KINDS


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[None]:
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    ray.init(
        address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False,
        runtime_env=here,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.long
@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("tasks", "workers", "gpus"),
    [(2, 2, 1.0), (3, 1, 0.5), (3, 1, 0.33)],
)
def test_every_rank_of_reward_training_computes_on_the_gpu_it_was_given(
    tasks: int, workers: int, gpus: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gloo = TorchConfig(backend="gloo")  # NCCL needs devices
    noting = partial(TorchTrainer, note_devices, torch_config=gloo)
    monkeypatch.setattr(train_rewards, "TorchTrainer", lambda _train, **rest: noting(**rest))
    for name, value in train_rewards._RAY_TRAIN_ENV.items():
        monkeypatch.setenv(name, value)
    config = load_config(
        None,
        [
            f"reward.workers={workers}", f"reward.gpus_per_worker={gpus}",
            "reward.cpus_per_worker=0.5",
        ],
    )  # fmt: skip
    queue = Queue(actor_options={"num_cpus": 0})
    made = [
        RewardTask(
            kinds=(kind,), digests={}, backbone_digest="", rows=None, config=config,
            out_dir=tmp_path, queue=queue,
        )
        for kind in DEFAULT_KINDS[:tasks]
    ]  # fmt: skip
    seen: list[dict[str, Any]] = []
    fits = [partial(train_rewards._fit, task) for task in made]
    train_rewards._follow(fits, queue, lambda *told: seen.append(told[3]))
    queue.shutdown(force=True)
    assert len(seen) == tasks * workers
    for rank in seen:
        assert rank["device"] == f"cuda:{rank['local_rank']}"
        assert [rank["visible"][rank["local_rank"]]] == rank["given"]
    used = [rank["given"][0] for rank in seen]
    assert len(set(used)) == (4 if gpus == 1 else 2 if gpus == 0.5 else 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward.gpus_per_worker=2"], ["one process uses one GPU", "raise reward.workers"]),
        (
            ["reward.workers=2", "reward.gpus_per_worker=0.5"],
            ["NCCL refuses", "set reward.gpus_per_worker=1, or reward.workers=1"],
        ),
        (
            ["cluster.learner.replicas=2", "cluster.learner.gpus=0.3"],
            ["NCCL refuses", "set cluster.learner.gpus=1, or cluster.learner.replicas=1"],
        ),
        (["cluster.learner.gpus=2"], ["one GPU", "raise cluster.learner.replicas"]),
        (["cluster.reference.gpus=1.5"], ["one GPU", "raise cluster.reference.replicas"]),
        (
            ["cluster.rollout.gpus=1", "cluster.engine.tensor_parallel=2"],
            ["tensor_parallel = 2", "set cluster.rollout.gpus=2"],
        ),
        (["cluster.rollout.gpus=2"], ["tensor_parallel = 1", "set cluster.rollout.gpus=1"]),
        (
            ["cluster.judge.gpus=0.5", "cluster.engine.tensor_parallel=2"],
            ["cluster.judge.gpus = 0.5", "set cluster.judge.gpus=2"],
        ),
    ],
)
def test_gpus_that_cannot_be_used_as_asked_are_refused(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["reward.workers=2", "reward.gpus_per_worker=1"],
        ["reward.workers=2", "reward.gpus_per_worker=0"],
        ["cluster.rollout.gpus=0.5", "cluster.judge.gpus=0.5", "cluster.learner.gpus=0.1"],
        ["cluster.rollout.gpus=2", "cluster.engine.tensor_parallel=2"],  # the judge is an API
        ["cluster.engine.tensor_parallel=2"],  # on the CPU
        ["cluster.learner.replicas=2", "cluster.learner.gpus=1"],
    ],
)
def test_gpus_that_can_be_used_as_asked_are_not(overrides: list[str]) -> None:
    load_config(None, overrides)
