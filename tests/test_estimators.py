"""Estimators without a critic, each against plain loops; what they refuse; runs of each that end
the same after a break, whatever is sampled ahead."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import light_actors
import nodes_job
import numpy as np
import pytest
from fakes import World, prompts, response
from nodes import lasting, steps
from test_driver import config as fake_config
from test_driver import driver

from cluster.memory.actors import actor_memory, read_models
from cluster.pipeline.keys import kind_of
from fgaif.config import Config, load_config
from fgaif.data.order import batch_indexes, sample_numbers
from fgaif.errors import ActorError, ConfigError, DataError
from fgaif.ppo.advantages import grpo, reinforce, rloo, token_grpo, whiten
from fgaif.ppo.batch import make_batch, prompt_groups
from fgaif.ppo.importance import drop_alone
from fgaif.ppo.rollout_dump import read_dump, recompute
from fgaif.tracking import explain
from fgaif.types import Evaluation

GROUPED = ["grpo", "rloo", "token_grpo"]
WITHOUT_CRITIC = ["reinforce", *GROUPED]
ALL = ["gae", *WITHOUT_CRITIC]


def ragged(seed: int = 0) -> tuple[np.ndarray, ...]:
    """Rewards, segments' rewards and mask (7, 6) with NaN at padding; groups of 3, 2 and 2."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(6) < rng.integers(1, 7, (7, 1))).astype(np.float32)
    rewards, own = rng.normal(size=(2, 7, 6)).astype(np.float32)
    rewards[mask == 0] = own[mask == 0] = np.nan
    return rewards, own, mask, np.array([0, 2, 0, 1, 2, 0, 1])


def slow_totals(rewards: np.ndarray, mask: np.ndarray, groups: np.ndarray) -> dict[int, list]:
    found = defaultdict(list)
    for row in range(len(mask)):
        total = sum(float(r) for r, m in zip(rewards[row], mask[row], strict=True) if m)
        found[int(groups[row])].append((row, total))
    return found


def spread(per_row: dict[int, float], mask: np.ndarray) -> np.ndarray:
    return np.array([[per_row[b] * m for m in mask[b]] for b in range(len(mask))])


def slow_grpo(rewards: np.ndarray, mask: np.ndarray, groups: np.ndarray) -> np.ndarray:
    per_row = {}
    for members in slow_totals(rewards, mask, groups).values():
        mean = sum(total for _, total in members) / len(members)
        variance = sum((total - mean) ** 2 for _, total in members) / (len(members) - 1)
        per_row |= {row: (total - mean) / (variance**0.5 + 1e-6) for row, total in members}
    return spread(per_row, mask)


@pytest.mark.parametrize("seed", range(3))
def test_grpo_against_loops(seed: int) -> None:
    rewards, _, mask, groups = ragged(seed)
    expected = slow_grpo(rewards, mask, groups)
    np.testing.assert_allclose(grpo(rewards, groups, mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_rloo_against_loops(seed: int) -> None:
    rewards, _, mask, groups = ragged(seed)
    per_row = {}
    for members in slow_totals(rewards, mask, groups).values():
        for row, total in members:
            others = [value for other, value in members if other != row]
            per_row[row] = total - sum(others) / len(others)
    expected = spread(per_row, mask)
    np.testing.assert_allclose(rloo(rewards, groups, mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_token_grpo_against_loops(seed: int) -> None:
    rewards, own, mask, groups = ragged(seed)
    expected = slow_grpo(rewards, mask, groups)
    for row, column in zip(*np.nonzero(mask), strict=True):
        if own[row, column] < 0:
            expected[row, column] -= 0.25 * abs(expected[row, column])
    found = token_grpo(rewards, own, groups, mask, penalty=0.25)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(found, grpo(rewards, groups, mask))


@pytest.mark.parametrize("seed", range(3))
def test_reinforce_against_loops(seed: int) -> None:
    rewards, _, mask, _ = ragged(seed)
    expected = np.zeros_like(mask)
    for row in range(7):
        length = int(mask[row].sum())
        for t in range(length):
            expected[row, t] = sum(0.9 ** (s - t) * rewards[row, s] for s in range(t, length))
    np.testing.assert_allclose(reinforce(rewards, mask, gamma=0.9), expected, rtol=1e-5, atol=1e-6)


def test_equal_rewards_in_a_group_give_no_advantage() -> None:
    rewards, mask = np.ones((4, 2), np.float32), np.ones((4, 2), np.float32)
    groups = np.array([0, 0, 1, 1])
    for compare in (grpo, rloo):
        np.testing.assert_array_equal(compare(rewards, groups, mask), 0.0)


def test_advantages_are_float32_and_zero_at_padding() -> None:
    rewards, own, mask, groups = ragged()
    for found in (
        grpo(rewards, groups, mask), rloo(rewards, groups, mask),
        reinforce(rewards, mask, gamma=1.0),
        token_grpo(rewards, own, groups, mask, penalty=0.1),
    ):  # fmt: skip
        assert found.dtype == np.float32
        assert (found[mask == 0] == 0).all()


def test_a_group_of_one_is_refused() -> None:
    rewards, mask = np.ones((3, 1), np.float32), np.ones((3, 1), np.float32)
    with pytest.raises(DataError, match=r"response 1 .* ppo\.samples_per_prompt must be 2"):
        grpo(rewards, np.array([0, 1, 0]), mask)


# --- batches and configuration --------------------------------------------------------------------


def a_batch(estimator: str, *, values: bool = True, kl_in_loss: bool = False):
    rng = np.random.default_rng(3)
    responses = [response(prompt, n) for prompt in prompts(2) for n in range(3)]
    rows = [rng.normal(size=(4, 4)).astype(np.float32) for _ in responses]
    return make_batch(
        responses,
        [row[0] for row in rows],
        [
            Evaluation(reference_logprobs=row[1], values=row[2] if values else None)
            for row in rows
        ],
        [row[3] for row in rows],
        kl_coef=0.5, gamma=1.0, lam=0.9, estimator=estimator,
        own_rewards=[row[3] for row in rows], token_penalty=0.1, kl_in_loss=kl_in_loss,
    )  # fmt: skip


@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_a_batch_without_a_critic_has_no_values(estimator: str) -> None:
    batch = a_batch(estimator, values=False)
    assert batch.values is None
    assert batch.returns is None
    groups = prompt_groups(batch.responses)
    np.testing.assert_array_equal(groups, [0, 0, 0, 1, 1, 1])
    expected = {
        "reinforce": lambda: whiten(reinforce(batch.rewards, batch.mask, gamma=1.0), batch.mask),
        "grpo": lambda: grpo(batch.rewards, groups, batch.mask),
        "rloo": lambda: rloo(batch.rewards, groups, batch.mask),
        "token_grpo": lambda: token_grpo(
            batch.rewards, batch.task_rewards, groups, batch.mask, penalty=0.1
        ),
    }[estimator]()
    np.testing.assert_array_equal(batch.advantages, expected)


def test_gae_needs_values() -> None:
    with pytest.raises(DataError, match=r"response p0#0: no values, which ppo\.estimator = 'gae'"):
        a_batch("gae", values=False)


def test_the_kl_is_in_the_rewards_or_in_the_loss() -> None:
    inside, outside = a_batch("grpo"), a_batch("grpo", kl_in_loss=True)
    assert (inside.kl_loss_coef, outside.kl_loss_coef) == (0.0, 0.5)
    np.testing.assert_array_equal(outside.rewards, outside.task_rewards)
    kl = inside.old_logprobs - inside.reference_logprobs
    np.testing.assert_allclose(inside.rewards, inside.task_rewards - 0.5 * kl, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.estimator=grpo"], r"ppo\.samples_per_prompt = 1 makes groups of one; set ppo\.sam"),
        (["ppo.samples_per_prompt=5"], r"groups would be uneven; set ppo\.rollout_batch=515"),
        (
            ["ppo.estimator=rloo", "ppo.samples_per_prompt=4", "ppo.gamma=0.9"],
            r"ppo\.gamma = 0\.9: .* set ppo\.gamma=1",
        ),
        (
            ["ppo.estimator=token_grpo", "ppo.samples_per_prompt=4", "ppo.shape.placement=last"],
            r"set ppo\.shape\.placement=segment, or ppo\.estimator=grpo",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_fix(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(None, overrides)
    fixes = str(refused.value).rpartition("; set ")[2].split(" or ")[0].rstrip(",")
    load_config(None, [*overrides, fixes])  # the advice can be followed


@pytest.mark.parametrize(("size", "batch"), [(1, 8), (4, 8), (2, 24)])
def test_sample_numbers_tell_all_responses_to_a_prompt_apart(size: int, batch: int) -> None:
    """Over ten steps of a data set of five prompts, whose epochs end within batches."""
    seen: Counter[tuple[str, int]] = Counter()
    for step in range(10):
        chosen = batch_indexes(5, batch // size, step, seed=0)
        ids = [f"p{index}" for index in chosen for _ in range(size)]
        numbers = sample_numbers(ids, step, size)
        seen.update(zip(ids, numbers, strict=True))
    assert max(seen.values()) == 1
    assert sample_numbers(["a", "b"], 7, 1) == [7, 7]  # the step, as ever
    assert sample_numbers(["a", "a", "b", "b"], 3, 2) == [6, 7, 6, 7]


def test_a_response_that_lost_the_others_to_its_prompt_is_left_out() -> None:
    a, b, c = prompts(3)
    kept, alone = drop_alone([response(a), response(b), response(a, 1), response(c)])
    assert [one.prompt.id for one in kept] == ["p0", "p0"]
    assert alone == 2


@pytest.mark.parametrize("key", ["ppo.value_lr", "ppo.value_lora.r", "ppo.lam"])
def test_keys_of_a_critic_that_is_not_there_change_no_training(key: str) -> None:
    without = ["ppo.estimator=grpo", "ppo.samples_per_prompt=4"]
    assert kind_of(load_config(None, []), "train", key) == "result"
    assert kind_of(load_config(None, without), "train", key) == "execution"
    assert kind_of(load_config(None, without), "train", "ppo.lr") == "result"


# --- the loop -------------------------------------------------------------------------------------


def overrides(estimator: str) -> list[str]:
    size = 1 if estimator == "gae" else 4
    return [f"ppo.estimator={estimator}", f"ppo.samples_per_prompt={size}"]


@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_nobody_asks_for_a_critic_that_is_not_there(tmp_path: Path, estimator: str) -> None:
    world = World()
    world.critic = False
    settings = fake_config(tmp_path, *overrides(estimator))
    reports = list(driver(world, settings).run())
    assert world.value_updates == 0
    assert not any(name.startswith("value/") for report in reports for name in report.metrics)
    assert all(explain(name) for name in reports[0].metrics)
    checkpoint = settings.run_dir / "policy" / "checkpoints" / "step_000006"
    assert sorted(path.name for path in checkpoint.iterdir() if path.is_dir()) == [
        "adapter", "learner",
    ]  # fmt: skip


def test_a_group_whose_others_were_set_aside_is_left_out_and_counted(tmp_path: Path) -> None:
    world = World()
    world.critic = False
    settings = fake_config(tmp_path, *overrides("grpo"), "ppo.rollout_batch=8")
    lonely = driver(World(), settings)._requests(0)[:3]
    world.poison_ids = {f"{one.prompt.id}#{one.sample}" for one in lonely}
    first = next(driver(world, settings).run())
    assert first.metrics["rollout/set_aside"] == 3
    assert first.metrics["rollout/alone"] == 1
    assert world.batch_sizes == [4]
    world.poison_ids |= {
        f"{one.prompt.id}#{one.sample}" for one in driver(World(), settings)._requests(0)[5:]
    }
    with pytest.raises(ActorError, match=r"every response lost the others to its prompt \(6 of 8"):
        next(driver(world, settings).run())


def light(folder: Path, estimator: str, *more: str) -> Config:
    settings = load_config(
        None,
        [
            f"dir={folder}", "name=light", "ppo.steps=5", "ppo.rollout_batch=12",
            "ppo.minibatch=6", "ppo.checkpoint_every=2", "policy.max_new_tokens=16",
            "tracking.rollouts=1", *overrides(estimator), *more,
        ],
    )  # fmt: skip
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    (settings.run_dir / "pace").write_text("0")
    return settings


class Cut(Exception):
    """The run is cut off here."""


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("estimator", ALL)
def test_a_run_cut_off_and_resumed_ends_as_the_whole_one(
    tmp_path: Path, estimator: str, depth: int
) -> None:
    """Every bit of every response and advantage moves the light policy."""
    ahead = f"ppo.async_depth={depth}"
    whole, cut = (light(tmp_path / name, estimator, ahead) for name in ("whole", "cut"))
    nodes_job.train(whole, light_actors.Here(whole).roles())

    def stop(report) -> None:
        if report.step == 3:
            raise Cut

    with pytest.raises(Cut):
        nodes_job.train(cut, light_actors.Here(cut).roles(), stop)
    again = light(tmp_path / "cut", estimator, ahead, "ppo.resume=latest")
    nodes_job.train(again, light_actors.Here(again).roles())
    ours, theirs = (
        # With batches ahead a step reports the sync before its own, which a new process has not.
        [
            {k: v for k, v in lasting(row["metrics"]).items() if not k.startswith("sync/")}
            for row in rows
        ]
        for rows in (steps(cut.run_dir), steps(whole.run_dir))
    )
    assert ours == theirs
    assert len(ours) == 5
    for path in ("policy/adapter/policy.json", "trained/4.json", "trained/5.json"):
        assert (cut.run_dir / path).read_text() == (whole.run_dir / path).read_text()
    ids = [row[0] for row in json.loads((whole.run_dir / "trained/5.json").read_text())]
    assert len(set(ids)) == 12


def test_estimators_make_policies_of_their_own(tmp_path: Path) -> None:
    policies = set()
    for estimator in WITHOUT_CRITIC:
        settings = light(tmp_path / estimator, estimator)
        nodes_job.train(settings, light_actors.Here(settings).roles())
        policies.add((settings.run_dir / "policy/adapter/policy.json").read_text())
    assert len(policies) == len(WITHOUT_CRITIC)


@pytest.mark.parametrize("estimator", ALL)
def test_dumps_of_every_estimator_are_computed_anew_to_the_bit(
    tmp_path: Path, estimator: str
) -> None:
    settings = light(tmp_path, estimator, "ppo.steps=1")
    nodes_job.train(settings, light_actors.Here(settings).roles())
    dump = read_dump(settings.run_dir / "policy" / "rollouts" / "step_000001.jsonl")
    assert dump.header.estimator == estimator
    fresh = recompute(dump, settings.ppo)
    assert ("returns" in fresh) == ("values" in dump.rows[0].tokens) == (estimator == "gae")
    for name, arrays in fresh.items():
        for row, array in zip(dump.rows, arrays, strict=True):
            np.testing.assert_array_equal(array, row.tokens[name])


def test_the_memory_plan_pays_for_no_critic(tiny_llava_dir: Path) -> None:
    base = [f"policy.model={tiny_llava_dir}", "ppo.value_init=object", "reward.backbone=gone"]
    settings = load_config(None, [*base, *overrides("grpo")])
    models = read_models(settings, {"reference"})  # and reads no backbone of values
    found = actor_memory("reference", settings, models, gpu=None, on_gpu=False)
    assert found.adapters == found.optimizer == 0
    with_critic = load_config(None, [f"policy.model={tiny_llava_dir}"])
    paid = actor_memory("reference", with_critic, models, gpu=None, on_gpu=False)
    assert 0 < found.total < paid.total
