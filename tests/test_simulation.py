"""PPO in virtual time over the real driver and pool: iteration times, exactness, flat memory."""

import gc
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from simulated import Affine, Sampler, Seconds, Simulation

from fgaif.config import Config, load_config
from fgaif.data.order import batch_indexes

BATCH, CHUNK = 16, 4
EVEN = Seconds(
    start=30.0, load=0.25, prefill=0.5, token=0.02, publish=0.125,
    score=Affine(0.5), evaluate=Affine(1.0), logprobs=Affine(0.25),
    update=Affine(2.0), update_values=Affine(1.5),
)  # fmt: skip


@pytest.fixture(scope="module")
def equal() -> Sampler:
    """Responses of 25 tokens each: a chunk takes 0.5 + 25 * 0.02 = 1 s."""
    return Sampler(25, 0.0, 64, kinds=1)


@pytest.fixture(scope="module")
def ragged() -> Sampler:
    """Responses around 25 tokens, the longest 64: chunks take 1 to 1.8 s."""
    return Sampler(25, 0.4, 64, kinds=32)


def config(folder: Path, *overrides: str) -> Config:
    return load_config(
        None,
        [
            f"dir={folder}", "ppo.steps=20", f"ppo.rollout_batch={BATCH}", "ppo.minibatch=8",
            "ppo.checkpoint_every=1000", f"cluster.rollout.chunk={CHUNK}",
            "cluster.rollout.replicas=2", *overrides,
        ],
    )  # fmt: skip


def iterations(folder: Path, sampler: Sampler, seconds: Seconds, depth: int) -> list[float]:
    """Virtual seconds of the steps after the pipeline has filled and before it empties."""
    settings = config(folder, f"ppo.async_depth={depth}")
    ends = [step.now for step in Simulation(settings, seconds, sampler).run()]
    taken = [after - before for before, after in pairwise(ends)]
    return taken[2 : len(taken) - depth]


def test_on_policy_a_step_takes_the_sum_of_its_stages(tmp_path: Path, equal: Sampler) -> None:
    """Two engines do four chunks in 2 s; scoring waits for the reference, training for the policy:
    2 + 1 + 2, then 0.125 + 0.25 for the new version."""
    assert iterations(tmp_path, equal, EVEN, 0) == pytest.approx([5.375] * 17)


@pytest.mark.parametrize("update", [0.1, 0.75, 1.5, 6.0])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_that_samples_ahead_takes_little_more_than_its_slowest_stage(
    tmp_path: Path, ragged: Sampler, update: float, depth: int
) -> None:
    seconds = Seconds(
        start=30.0, load=0.25, prefill=0.5, token=0.02, publish=0.125,
        score=Affine(0.5), evaluate=Affine(0.5), logprobs=Affine(0.5), update=Affine(update),
        update_values=Affine(0.1),
    )  # fmt: skip
    training = 0.5 + update + 0.125
    alone = iterations(tmp_path / "alone", ragged, seconds, 0)
    sampling = sum(alone) / len(alone) - training
    ahead = iterations(tmp_path / "ahead", ragged, seconds, depth)
    mean = sum(ahead) / len(ahead)
    assert mean <= 1.15 * max(sampling, training)
    assert mean < 0.9 * (sampling + training)


@pytest.mark.parametrize("depth", [0, 1])
def test_groups_are_whole_whoever_dies(tmp_path: Path, ragged: Sampler, depth: int) -> None:
    """Four samples of each of four prompts in every step, from the same weights."""
    settings = config(
        tmp_path, f"ppo.async_depth={depth}", "ppo.estimator=grpo", "ppo.samples_per_prompt=4"
    )
    run = Simulation(settings, EVEN, ragged, prompts=50)
    for number in range(10):
        run.engines.kill(7.0 * number, f"rollout-{number % 2}")
    for index, step in enumerate(run.run()):
        asked = batch_indexes(50, BATCH // 4, index, settings.seed)
        expected = Counter({(f"p{i}", max(0, index - depth)): 4 for i in asked})
        assert Counter(run.trained.newest) == expected
        assert step.report.metrics["rollout/alone"] == 0
    assert sum(m.restarts for m in run.engines.pool.members.values()) > 0


@pytest.mark.parametrize("depth", [1])  # 0 and 2 are alike, and each takes 20 s
def test_two_hundred_steps_with_deaths_and_scaling_use_every_prompt_once_and_no_more_memory(
    tmp_path: Path, ragged: Sampler, depth: int
) -> None:
    settings = config(tmp_path, "ppo.steps=200", f"ppo.async_depth={depth}")
    run = Simulation(settings, EVEN, ragged, prompts=1000)
    for number in range(40):
        run.engines.kill(20.0 * number, f"rollout-{number % 3}")
        run.engines.resize(20.0 * number + 7.0, 1 + number % 4)
    held: dict[int, tuple[int, int]] = {}
    for index, step in enumerate(run.run()):
        asked = batch_indexes(1000, BATCH, index, settings.seed)
        expected = Counter((f"p{i}", max(0, index - depth)) for i in asked)
        assert Counter(run.trained.newest) == expected
        assert len(run.engines.pool.queue) <= depth * BATCH // CHUNK
        assert len(run.engines.pool._loads) <= 2
        if step.report.step in (60, 199):
            held[step.report.step] = memory()
        if step.report.step == 50:
            tracemalloc.start()
    tracemalloc.stop()
    assert run.engines.pool.set_aside == []
    assert sum(m.restarts for m in run.engines.pool.members.values()) > 0
    grown = [after - before for before, after in zip(held[60], held[199], strict=True)]
    assert grown[0] < 200  # objects; a response kept per step would be 139 and more
    assert grown[1] < 100_000  # bytes


def memory() -> tuple[int, int]:
    """Live objects, and bytes allocated since the trace began."""
    gc.collect()
    return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]


def test_engines_that_join_in_mid_run_shorten_its_steps(tmp_path: Path, equal: Sampler) -> None:
    """Sixteen chunks of a second: 16 s a step with one engine, 4 s with four; loading 0.25 s."""
    settings = config(
        tmp_path, "cluster.rollout.replicas=1", "cluster.rollout.chunk=1", "ppo.async_depth=1"
    )
    run = Simulation(settings, EVEN, equal)
    run.engines.resize(150.0, 4)
    ends = [step.now for step in run.run()]
    taken = [after - before for before, after in pairwise(ends)]
    assert taken[3:6] == pytest.approx([16.25] * 3)
    assert taken[-6:-1] == pytest.approx([4.25] * 5)


def test_an_engine_that_dies_costs_its_chunk_and_its_start(tmp_path: Path, equal: Sampler) -> None:
    """Both engines start within 30 s and sample the first response, 1 s, for the first sync. Of
    step 1's four chunks one is lost 0.5 s before its end, and the other engine does it."""
    ends: dict[str, list[float]] = {}
    for name in ("whole", "hit"):
        run = Simulation(config(tmp_path / name, "ppo.steps=20"), EVEN, equal)
        if name == "hit":
            run.engines.kill(31.0 + 0.125 + 0.25 + 0.5, "rollout-1")
        ends[name] = [step.now for step in run.run()]
    late = [hit - whole for hit, whole in zip(ends["hit"], ends["whole"], strict=True)]
    assert late[0] == pytest.approx(2.0 - 1.0 + 1.0)
    again = [later - before for before, later in pairwise(late)]
    assert again[:3] == pytest.approx([2.0] * 3)
    assert again[-6:] == pytest.approx([0.0] * 6)


def test_a_step_looks_at_its_own_prompts_only(tmp_path: Path, equal: Sampler) -> None:
    run = Simulation(config(tmp_path), EVEN, equal, prompts=1_000_000)
    steps = sum(1 for _ in run.run())
    assert run.prompts.asked <= 2 * BATCH * (steps + 1)


def test_the_same_run_comes_out_the_same(tmp_path: Path, ragged: Sampler) -> None:
    def ends(folder: Path) -> list[tuple[Any, ...]]:
        steps = Simulation(config(folder, "ppo.async_depth=1"), EVEN, ragged).run()
        return [(step.now, step.report.metrics["length/tokens"]) for step in steps]

    assert ends(tmp_path / "a") == ends(tmp_path / "b")
