"""Learner and reference killed in mid-update end bitwise where undisturbed ones do.

Real DeepSpeed engines on a tiny LLaVA in Ray actors.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doomed import DoomedLearner, DoomedReference, DoomedShared, doom
from ppo_world import make_responses, make_train_batch, questions, tiny_config
from safetensors.torch import load_file

from actors.deepspeed_setup import free_port
from actors.learner import LearnerActor
from cluster.groups.actor_group import ActorGroup, RestartLimits
from cluster.groups.placed_actor import PlacedActor
from cluster.groups.role_groups import LearnerGroup, ReferenceGroup
from cluster.groups.shared_process import RolePart
from cluster.launch import create_actor, meeting_point, reserve
from cluster.placement import Bundle, Role
from fgaif.config import Config
from fgaif.types import Evaluation, Response, TrainBatch, UpdateReport

LIMITS = RestartLimits(call_s=120, start_s=120, restarts=1)


pytestmark = pytest.mark.usefixtures("local_ray")


def config_of(model: Path, run_dir: Path, **ppo: Any) -> Config:
    """Anchors and a schedule: everything that a recovery has to bring back."""
    config = tiny_config(
        model, run_dir, schedule="cosine", warmup_steps=2,
        anchor={"weight": 2.0, "batch_size": 3},
        value_lora={"r": 4, "alpha": 4.0}, **ppo,
    )  # fmt: skip
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config


def bundle(name: str) -> Bundle:
    return Bundle(role="learner", name=name, cpus=0.5, gpus=0)


def learners(config: Config, world: int) -> LearnerGroup:
    def start() -> list[PlacedActor]:
        bundles = [bundle(f"learner-{rank}") for rank in range(world)]
        groups = [reserve(item) for item in bundles]
        meeting = meeting_point(groups, 60, threading.Event())
        return [
            PlacedActor(
                b.name, *create_actor(b, DoomedLearner, (config, rank, world, *meeting), "1", g)
            )
            for rank, (b, g) in enumerate(zip(bundles, groups, strict=True))
        ]

    return LearnerGroup(ActorGroup("learner", start, LIMITS))


def reference(config: Config) -> ReferenceGroup:
    def start() -> list[PlacedActor]:
        arguments = (config, config.run_dir)
        place = bundle("reference")
        return [PlacedActor(place.name, *create_actor(place, DoomedReference, arguments, "1"))]

    return ReferenceGroup(ActorGroup("reference", start, LIMITS))


def batches(responses: list[Response], count: int) -> list[TrainBatch]:
    old = [np.full(len(response.token_ids), -5.0, np.float32) for response in responses]
    return [make_train_batch(responses, old, seed=seed) for seed in range(count)]


def timeless(report: UpdateReport) -> dict[str, float]:
    return {key: value for key, value in report.metrics.items() if "seconds" not in key}


def values(evaluations: list[Evaluation]) -> list[list[float]]:
    return [evaluation.values.tolist() for evaluation in evaluations]


def in_one_process(config: Config) -> tuple[LearnerGroup, ReferenceGroup]:
    holds: tuple[Role, ...] = ("learner", "reference")
    place = Bundle(role="shared", name="shared-0", cpus=0.5, gpus=0, holds=holds)

    def start() -> list[PlacedActor]:
        arguments = (config, holds, config.run_dir, 0, 1, "", 0)
        return [PlacedActor(place.name, *create_actor(place, DoomedShared, arguments, "1"))]

    processes = ActorGroup("shared", start, LIMITS)
    learner, valuer = (RolePart(processes, role) for role in holds)
    return LearnerGroup(learner), ReferenceGroup(valuer)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_learner_and_reference_killed_in_the_same_updates(
    tiny_llava_dir: Path, tmp_path: Path, layout: str
) -> None:
    """Both are killed in the first update after a start, and again after a checkpoint; in one
    process the first to get there takes the other along."""
    config = config_of(tiny_llava_dir, tmp_path)
    responses = make_responses(tmp_path, 8)
    asked, todo = questions(responses), batches(responses, 3)
    shared = layout == "shared"
    learner, valuer = in_one_process(config) if shared else (learners(config, 1), reference(config))
    learner.save(tmp_path / "start" / "learner").result()
    valuer.save(tmp_path / "start" / "reference").result()
    whole = [
        (learner.update(batch, asked).result(), valuer.update_values(batch).result())
        for batch in todo
    ]
    digest = learner.publish(3).result().digest
    expected = values(valuer.evaluate(responses).result())
    learner.restore(tmp_path / "start" / "learner").result()
    valuer.restore(tmp_path / "start" / "reference").result()

    for step, batch in enumerate(todo):
        victims = ("learner-0",) if shared else ("learner-0", "reference")
        for name in victims if step != 1 else ():
            doom(config.run_dir, name)
        updates = learner.update(batch, asked), valuer.update_values(batch)
        for pending, undisturbed in zip(updates, whole[step], strict=True):
            assert timeless(pending.result()) == timeless(undisturbed)
        if step == 1:
            learner.save(tmp_path / "aside" / "learner").result()
            valuer.save(tmp_path / "aside" / "reference").result()
            (tmp_path / "aside").rename(tmp_path / "settled")
            learner.set_restore_point(tmp_path / "settled" / "learner")
            valuer.set_restore_point(tmp_path / "settled" / "reference")
    assert learner.publish(3).result().digest == digest
    assert values(valuer.evaluate(responses).result()) == expected
    groups = [learner.actor_group, valuer.actor_group]
    assert [len(group.recoveries) for group in groups] == [2, 2]
    learner.stop()
    valuer.stop()


@pytest.mark.long
def test_two_ranks_start_again_when_one_is_killed(tiny_llava_dir: Path, tmp_path: Path) -> None:
    """The other rank is in a collective then; both meet anew at another port."""
    config = config_of(tiny_llava_dir, tmp_path)
    responses = make_responses(tmp_path, 8)
    asked, todo = questions(responses), batches(responses, 2)
    learner = learners(config, 2)
    learner.save(tmp_path / "start").result()

    def train() -> tuple[list[dict[str, float]], str]:
        reports = [learner.update(batch, asked).result() for batch in todo]
        return [timeless(report) for report in reports], learner.publish(2).result().digest

    whole = train()
    learner.restore(tmp_path / "start").result()
    first = learner.update(todo[0], asked).result()
    doom(config.run_dir, "learner-1")
    second = learner.update(todo[1], asked).result()
    assert [timeless(first), timeless(second)] == whole[0]
    assert learner.publish(2).result().digest == whole[1]
    old = learner.logprobs(responses[:3]).result()
    assert [len(row) for row in old] == [len(response.token_ids) for response in responses[:3]]
    assert len(learner.actor_group.recoveries) == 1
    learner.stop()


@pytest.mark.long
@pytest.mark.ci
def test_two_ranks_under_zero_3_equal_one(wide_llava_dir: Path, tmp_path: Path) -> None:
    """Sync, update, checkpoint and resume of a policy whose weights no rank holds alone.

    Every forward pass is a collective, so both ranks must make it: also for the one response that
    a sync scores, and though their feature caches miss different images.
    """
    config = config_of(wide_llava_dir, tmp_path, zero_stage=3, minibatch=5, lr=1e-3)
    responses = make_responses(tmp_path, 5)
    asked, (batch, *_) = questions(responses), batches(responses, 1)
    alone = LearnerActor(config, 0, 1, "127.0.0.1", free_port())
    scored = alone.logprobs(responses)
    reports = [alone.update(batch, asked), alone.update(batch, asked)]
    expected = alone.publish(2).tensors

    learner = learners(config, 2)
    for some in (responses[:1], responses):
        rows = learner.logprobs(some).result()
        for row, wanted in zip(rows, scored[: len(some)], strict=True):
            np.testing.assert_allclose(row, wanted, atol=1e-4)
    first = learner.update(batch, asked).result()
    learner.save(tmp_path / "saved").result()
    learner.update(batch, asked).result()
    learner.restore(tmp_path / "saved").result()
    second = learner.update(batch, asked).result()
    published = learner.publish(2).result().tensors
    learner.save_adapter(tmp_path / "adapter").result()
    learner.stop()
    for two, one in zip((first, second), reports, strict=True):
        for key in ("policy/loss", "policy/anchor_kl", "policy/entropy", "policy/grad_norm"):
            assert two.metrics[key] == pytest.approx(one.metrics[key], rel=1e-3, abs=1e-5), key
    for name, value in expected.items():
        np.testing.assert_allclose(published[name], value, atol=2e-5, err_msg=name)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == len(expected)
