"""Engines that sleep while others work: the order of calls, and what the memory plan makes of it.

vLLM ignores sleep mode on the CPU, so the engine here is one that notes what it is asked.
"""

from pathlib import Path

import pytest
from transformers import LlavaConfig

from actors.vllm_engine import VllmEngine
from cluster.memory.devices import parse_assumed
from cluster.memory.plan import plan_memory
from fgaif.config import load_config, with_overrides
from fgaif.errors import ConfigError
from fgaif.lvlm.sizes import config_facts

CONFIGS = Path(__file__).parents[1] / "configs"


class Noting:
    """Stands in for vLLM's engine."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def wake_up(self) -> None:
        self.calls.append("wake up")

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def reset_encoder_cache(self) -> None:
        self.calls.append("forget")

    def reset_prefix_cache(self) -> bool:
        return True


@pytest.fixture(params=[True, False])
def engine(request: pytest.FixtureRequest) -> tuple[VllmEngine, Noting]:
    made, llm = VllmEngine.__new__(VllmEngine), Noting()
    made._sleeps, made._llm = request.param, llm
    return made, llm


def test_an_engine_that_sleeps_wakes_for_its_work_alone(
    engine: tuple[VllmEngine, Noting],
) -> None:
    made, llm = engine
    with made.awake():
        llm.calls.append("work")
    with pytest.raises(ZeroDivisionError), made.awake():
        raise ZeroDivisionError
    around = ["wake up", "work", "forget", "sleep 1", "wake up", "forget", "sleep 1"]
    assert llm.calls == (around if made._sleeps else ["work"])


def test_engines_that_sample_ahead_may_not_sleep() -> None:
    with pytest.raises(ConfigError, match=r"set ppo\.async_depth=0"):
        load_config(None, ["cluster.engine.sleep=true", "ppo.async_depth=1"])


def test_a_sleeping_engine_and_what_works_meanwhile_are_not_added_up() -> None:
    config = load_config(CONFIGS / "one_gpu_48gb.yaml")
    models = {"checkpoints/llava-1.5-7b-hf": config_facts(LlavaConfig())}
    asleep = with_overrides(config, ["cluster.engine.sleep=true"])
    plans = [
        {load.phase: load for load in plan_memory(each, devices=parse_assumed("1x48"),
                                                   models=models).loads if load.gpu == 0}
        for each in (config, asleep)
    ]  # fmt: skip
    stays, sleeps = (plan["feedback"].total for plan in plans)
    assert sleeps < 0.6 * stays
    engine, shared = plans[1]["PPO"].actors
    awake = engine.memory.total + shared.memory.total - shared.memory.activations
    assert plans[1]["PPO"].total == max(awake, engine.memory.process + shared.memory.total)
