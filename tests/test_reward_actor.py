"""Reward training on Ray Train and DeepSpeed, and the actors that serve its result."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
import reward_samples
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

from actors.reward import RewardActor, SharedRewardActor
from cluster.pipeline.train_rewards import explain_failure, train_rewards
from fgaif.config import Config, with_overrides
from fgaif.errors import ActorError, CheckpointError, DataError
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.model import load_lvlm
from fgaif.reward import local
from fgaif.reward.checkpoint import read_card
from fgaif.reward.dataset import read_data
from fgaif.reward.inputs import load_reward_encoder
from fgaif.reward.local import PlainEngine
from fgaif.reward.model import new_reward_model
from fgaif.reward.train import TrainedReward, planned_steps, train_reward_model
from fgaif.types import DEFAULT_KINDS, Kind, LabeledResponse

pytestmark = pytest.mark.slow

Told = list[tuple[Kind, int, int, dict[str, float]]]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(tiny_llava_dir: Path) -> Config:
    return reward_samples.settings(
        tiny_llava_dir, epochs=4, batch_size=8, head="mlp", parallel=2, val_fraction=0.2
    )


@pytest.fixture(scope="module")
def rows(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LabeledResponse]:
    pictures = reward_samples.images(tmp_path_factory.mktemp("images"), 20)
    return reward_samples.labelled(tiny_llava_dir, pictures, 120)


@pytest.fixture(scope="module", params=["here", pytest.param("ray", marks=pytest.mark.long)])
def trained(
    request: pytest.FixtureRequest,
    config: Config,
    rows: list[LabeledResponse],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[Kind, dict[str, float]], Told]:
    """Reward models of all kinds, their metrics, and what was told on the way."""
    folder, told = tmp_path_factory.mktemp("rewards"), []
    if request.param == "here":
        metrics = local.train_rewards(
            rows, folder, config, report=lambda *event: told.append(event)
        )
    else:
        request.getfixturevalue("local_ray")
        metrics = train_rewards(config, rows, folder, lambda *event: told.append(event))
    return folder, metrics, told


on_ray = pytest.mark.parametrize("trained", ["ray"], indirect=True)


def test_all_kinds_are_trained_and_reported(
    config: Config, trained: tuple[Path, dict[Kind, dict[str, float]], Told]
) -> None:
    folder, metrics, told = trained
    assert sorted(path.name for path in folder.iterdir()) == sorted(DEFAULT_KINDS)  # and no scratch
    assert set(metrics) == set(DEFAULT_KINDS)
    assert metrics["relation"]["f1_hallu"] > 0.9
    for kind in DEFAULT_KINDS:
        assert read_card(folder / kind).shape == config.ppo.shape
        steps = [(done, planned) for name, done, planned, _ in told if name == kind]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]
    assert any("val_loss" in figures for *_, figures in told)


@pytest.mark.long
@on_ray
def test_equal_inputs_are_not_trained_again(
    config: Config,
    rows: list[LabeledResponse],
    trained: tuple[Path, dict[Kind, dict[str, float]], Told],
) -> None:
    folder, metrics, _ = trained
    before = (folder / "object" / "reward.json").stat().st_mtime_ns
    told: Told = []
    assert train_rewards(config, rows, folder, lambda *event: told.append(event)) == metrics
    assert [event[:3] for event in told] == [(kind, 1, 1) for kind in DEFAULT_KINDS]
    assert (folder / "object" / "reward.json").stat().st_mtime_ns == before
    # Another shape of the rewards is no reason to train again, but stands in the cards.
    other = with_overrides(config, ["ppo.shape.values=hard"])
    assert train_rewards(other, rows, folder, lambda *event: None) == metrics
    assert [read_card(folder / kind).shape for kind in DEFAULT_KINDS] == [other.ppo.shape] * 3
    train_rewards(config, rows, folder, lambda *event: None)


def test_actor_scores_alike_in_any_batch(
    config: Config,
    rows: list[LabeledResponse],
    trained: tuple[Path, dict[Kind, dict[str, float]], Told],
) -> None:
    actor = RewardActor(trained[0] / "relation", config)
    assert actor.info().kind == "relation"
    responses, segments = [row.response for row in rows], [row.segments for row in rows]
    probs = actor.score(responses, segments)
    labels = np.concatenate([row.labels[:, DEFAULT_KINDS.index("relation")] for row in rows])
    assert (np.concatenate(probs).argmax(-1) == labels).mean() > 0.9
    for index in (0, 50, 119):
        (alone,) = actor.score_pairs([(responses[index], segments[index])])
        assert np.allclose(alone, probs[index], atol=1e-5)
    assert actor.score(responses[:1], [()])[0].shape == (0, 3)
    assert actor.score([], []) == []


def test_shared_actor_equals_the_three_actors(
    config: Config,
    rows: list[LabeledResponse],
    trained: tuple[Path, dict[Kind, dict[str, float]], Told],
) -> None:
    responses, segments = [r.response for r in rows[:10]], [r.segments for r in rows[:10]]
    shared = SharedRewardActor(trained[0], config)
    together = shared.score(responses, segments)
    paired = shared.score_pairs(list(zip(responses, segments, strict=True)))
    assert all(np.array_equal(a.probs, b) for a, b in zip(together, paired, strict=True))
    for k, kind in enumerate(DEFAULT_KINDS):
        alone = RewardActor(trained[0] / kind, config).score(responses, segments)
        for scores, probs in zip(together, alone, strict=True):
            assert np.allclose(scores.probs[:, k], probs, atol=1e-5)


def test_actor_refuses_a_reward_model_of_another_backbone(
    llava15_dir: Path, trained: tuple[Path, dict[Kind, dict[str, float]], Told]
) -> None:
    with pytest.raises(CheckpointError, match=r"set reward\.backbone"):
        RewardActor(trained[0] / "object", reward_samples.settings(llava15_dir))


@pytest.mark.long
@on_ray
def test_two_workers_under_zero_2_learn_the_same_task(
    config: Config,
    rows: list[LabeledResponse],
    trained: tuple[Path, dict[Kind, dict[str, float]], Told],
    tmp_path: Path,
) -> None:
    """Object and attribute are there already, so only the relation is trained."""
    for kind in ("object", "attribute"):
        shutil.copytree(trained[0] / kind, tmp_path / kind)
    two = config.reward.model_copy(update={"workers": 2, "zero_stage": 2})
    metrics = train_rewards(
        config.model_copy(update={"reward": two}), rows, tmp_path, lambda *event: None
    )
    assert metrics["relation"]["f1_hallu"] > 0.9
    assert metrics["object"] == trained[1]["object"]


@pytest.mark.long
def test_two_workers_under_zero_3_equal_one(
    local_ray: None, wide_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers' feature caches miss different images. Were the vision tower sharded, one worker
    would wait for the other's forward pass, here until gloo's minute is over."""
    impatient = partial(TorchTrainer, torch_config=TorchConfig(timeout_s=60))
    monkeypatch.setattr("cluster.pipeline.train_rewards.TorchTrainer", impatient)
    rows = reward_samples.labelled(wide_llava_dir, reward_samples.images(tmp_path, 12), 40)
    config = reward_samples.settings(
        wide_llava_dir, lr=1e-3, batch_size=4, micro_batch=1, epochs=1, evals=2,
        workers=2, zero_stage=3, parallel=1,
    )  # fmt: skip
    metrics = train_rewards(config, rows, tmp_path / "rewards", lambda *event: None)
    for number, kind in enumerate(DEFAULT_KINDS):
        alone = trained_alone(config, rows, kind, seed=config.seed * len(DEFAULT_KINDS) + number)
        assert metrics[kind]["val_loss"] == pytest.approx(alone.val_loss, rel=1e-3)
        assert metrics[kind]["steps"] == alone.steps


def trained_alone(
    config: Config, rows: list[LabeledResponse], kind: Kind, *, seed: int
) -> TrainedReward:
    """The same training in this process, without DeepSpeed."""
    checkpoint, settings = Path(config.policy.model), config.reward
    data = read_data(kind, rows, config)
    encoder = load_reward_encoder(checkpoint, checkpoint, max_image_pixels=10**6)
    backbone = load_lvlm(checkpoint, dtype="float32")
    model = new_reward_model(backbone, settings.lora, settings.head, seed)
    return train_reward_model(
        data, model,
        PlainEngine(model, settings, planned_steps(len(data.train), settings)),
        encoder, FeatureCache(backbone, encoder.encoder), settings,
        seed=seed, report=lambda *told: None,
    )  # fmt: skip


def test_too_little_data_is_refused_before_anything_starts(
    config: Config, rows: list[LabeledResponse], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="at least 2 are needed"):
        train_rewards(config, rows[:1], tmp_path, lambda *event: None)


def test_a_failed_worker_is_told_by_its_first_cause() -> None:
    ours = UserExceptionWithTraceback(DataError("row 3: no image"), "Traceback ...")
    explained = explain_failure(WorkerGroupError("workers failed", {1: ours}))
    assert isinstance(explained, DataError)
    assert str(explained) == "row 3: no image"
    theirs = UserExceptionWithTraceback(RuntimeError("out of memory"), "Traceback ...")
    explained = explain_failure(WorkerGroupError("workers failed", {0: theirs}))
    assert isinstance(explained, ActorError)
    assert "worker 0: RuntimeError: out of memory; finished" in str(explained)
