"""An engine that spreads its model over two processes, in a Ray actor as the cluster starts it."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from engines import engine_config, photo_prompts, requests, rollout_actor
from ray.util.placement_group import remove_placement_group

from actors.openai_server import server_command
from actors.rollout import RolloutActor
from actors.vllm_engine import engine_settings
from cluster.launch import create_actor
from cluster.placement import Bundle
from fgaif.config import Config, LoraConfig, load_config
from fgaif.lvlm.model import attach_lora, load_lvlm
from fgaif.lvlm.weights import make_manifest
from fgaif.types import WeightsManifest

LORA = LoraConfig(r=4, alpha=8.0)


def two_ranks() -> Config:
    config = engine_config()
    engine = config.cluster.engine.model_copy(update={"tensor_parallel": 2})
    cluster = config.cluster.model_copy(update={"engine": engine})
    return config.model_copy(update={"cluster": cluster})


class Rollout(RolloutActor):
    """The rollout role, and the processes that it has started."""

    def children(self) -> list[int]:
        """Process ids."""
        return [child.pid for child in psutil.Process().children(recursive=True)]


@pytest.fixture(scope="module")
def version(tiny_llava_dir: Path) -> WeightsManifest:
    """Version 1: factors large enough to change every log-prob."""
    model = attach_lora(load_lvlm(tiny_llava_dir, dtype="float32"), LORA, seed=0)
    draw = np.random.default_rng(0)
    factors = {
        name: draw.normal(0, 0.2, value.shape).astype(np.float32)
        for name, value in model.named_parameters()
        if "lora_" in name
    }
    return make_manifest(factors, scaling=LORA.scaling, version=1)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_ranks_are_processes_beside_the_actor(on_gpu: bool) -> None:
    """In a placement group vLLM would choose Ray's executor, which wants a bundle per GPU."""
    settings = engine_settings(two_ranks(), 100, on_gpu)
    assert settings["tensor_parallel_size"] == 2
    assert settings["distributed_executor_backend"] == "mp"
    assert "distributed_executor_backend" not in engine_settings(load_config(None), 100, on_gpu)


def test_the_server_s_ranks_are_too(tiny_llava_dir: Path) -> None:
    command = server_command(tiny_llava_dir, "eyes", two_ranks(), "127.0.0.1", 1234)
    assert command[command.index("--distributed-executor-backend") + 1] == "mp"


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_two_ranks_say_what_one_says_and_take_new_weights(
    tiny_llava_dir: Path, photos: Path, version: WeightsManifest
) -> None:
    bundle = Bundle(role="rollout", name="rollout-0", cpus=2, gpus=0)
    actor, group = create_actor(bundle, Rollout, (tiny_llava_dir, two_ranks()), "1")
    alone = rollout_actor(tiny_llava_dir)
    asked = requests(photo_prompts(photos))
    responses = ray.get(actor.generate.remote(asked))
    for one, other in zip(alone.generate(asked), responses, strict=True):
        np.testing.assert_array_equal(other.token_ids, one.token_ids)
        np.testing.assert_allclose(other.rollout_logprobs, one.rollout_logprobs, atol=1e-4)
    try:
        loaded = ray.get(actor.load_weights.remote(version)), alone.load_weights(version)
        assert [each.version for each in loaded] == [1, 1]
        found = np.concatenate(ray.get(actor.probe_logprobs.remote(responses)))
        expected = np.concatenate(alone.probe_logprobs(responses))
        before = np.concatenate([response.rollout_logprobs for response in responses])
        assert np.abs(expected - before).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=1e-4)
    finally:
        alone.load_weights(make_manifest({}, scaling=1.0, version=0))
    ranks = ray.get(actor.children.remote())
    assert len(ranks) >= 2
    ray.kill(actor)
    until(lambda: not any(psutil.pid_exists(pid) for pid in ranks))
    remove_placement_group(group)


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)
