"""The dry run's estimate of time, held against the formulas by hand."""

from pathlib import Path

import pytest
from transformers import LlavaConfig

from cluster.memory.actors import Models
from cluster.memory.devices import parse_assumed
from cluster.memory.plan import plan_memory
from cluster.memory.seconds import DEVICES, USED, device_of, estimate, work
from fgaif.config import Config, load_config, with_overrides
from fgaif.lvlm.sizes import config_facts

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def models() -> Models:
    return {"checkpoints/llava-1.5-7b-hf": config_facts(LlavaConfig())}


def config_of(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / name, list(overrides))


def seconds(config: Config, gpus: str, models: Models) -> dict[str, float]:
    plan = plan_memory(config, devices=parse_assumed(gpus), models=models)
    found = estimate(config, plan, models)
    assert found is not None
    return found


def test_devices_are_found_by_their_memory() -> None:
    assert device_of(80 * 10**9) == DEVICES[80]
    assert device_of(int(79.1 * 2**30)) == DEVICES[80], "as an H100 reports it"
    assert device_of(24 * 10**9) == DEVICES[24]
    assert device_of(10 * 10**9) is None


def test_a_sequence_takes_what_the_formulas_say(models: Models) -> None:
    """A 7B of 6.74e9 parameters, 576 + 64 + 384 tokens, on an A100 at 40 %."""
    config = config_of("one_gpu_80gb.yaml")
    model = models["checkpoints/llava-1.5-7b-hf"]
    found = work(model, config, DEVICES[80])
    assert model.language == pytest.approx(6.74e9, rel=1e-2)
    assert found.forward == pytest.approx(2 * 6.74e9 * 1024 / (USED * 312e12), rel=1e-2)
    assert found.training == pytest.approx(3 * found.forward), "with gradient checkpointing"
    read = 6.74e9 * 2 / (USED * 2.04e12)
    prompt = 2 * 6.74e9 * 640 / (USED * 312e12)
    assert found.sampling == pytest.approx(prompt + 384 * read / 64, rel=1e-2)


def test_what_shares_a_gpu_adds_up_and_others_work_beside_it(models: Models) -> None:
    one = config_of("one_gpu_80gb.yaml")
    each = work(models["checkpoints/llava-1.5-7b-hf"], one, DEVICES[80])
    found = seconds(one, "1x80", models)
    batch, epochs = one.ppo.rollout_batch, one.ppo.epochs
    # Three reward models, the reference, the value model and the learner; then two are trained.
    assert found["PPO step: score"] == pytest.approx(batch * 6 * each.forward)
    assert found["PPO step: update"] == pytest.approx(batch * 2 * epochs * each.training)
    parts = ("rollout", "score", "update")
    assert found["PPO step"] == pytest.approx(sum(found[f"PPO step: {part}"] for part in parts))
    apart = config_of("llava15_7b_4gpu.yaml", "feedback.verifier=checkpoints/llava-1.5-7b-hf",
                      f"policy.max_new_tokens={one.policy.max_new_tokens}")  # fmt: skip
    four = seconds(apart, "4x80", models)
    # The scorers' GPU is the slowest, then learner and reference train side by side.
    assert four["PPO step: score"] == pytest.approx(batch * 3 * each.forward)
    assert four["PPO step: update"] == pytest.approx(batch * epochs * each.training)


def test_a_method_without_critic_and_more_ranks_take_less(models: Models) -> None:
    one = config_of("one_gpu_80gb.yaml")
    each = work(models["checkpoints/llava-1.5-7b-hf"], one, DEVICES[80])
    without = with_overrides(one, ["ppo.estimator=rloo", "ppo.samples_per_prompt=4"])
    found = seconds(without, "1x80", models)
    batch = one.ppo.rollout_batch
    assert found["PPO step: score"] == pytest.approx(batch * 5 * each.forward)
    assert found["PPO step: update"] == pytest.approx(batch * one.ppo.epochs * each.training)
    ranks = with_overrides(
        one,
        ["cluster.learner.replicas=2", "cluster.learner.gpus=1", "cluster.rollout.gpus=1",
         "cluster.judge.gpus=1"],
    )  # fmt: skip
    two = seconds(ranks, "3x80", models)
    # Reference and value model stay with the first rank.
    score = (2 + (3 + 1) / 2) * each.forward
    assert two["PPO step: score"] == pytest.approx(batch * score)


def test_unknown_devices_give_no_estimate(models: Models) -> None:
    config = config_of("one_gpu_80gb.yaml")
    assert estimate(config, plan_memory(config, models=models), models) is None
    plan = plan_memory(config, devices=parse_assumed("1x10"), models=models)
    assert estimate(config, plan, models) is None
