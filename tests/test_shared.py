"""Several roles in one process on one base: the same numbers as apart, and weights held once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reward_samples
from ppo_world import make_responses, make_train_batch, questions, tiny_config

from actors.learner import LearnerActor
from actors.reference import ReferenceActor
from actors.reward import RewardActor
from actors.shared import SharedActor
from fgaif.config import Config, with_overrides
from fgaif.errors import ConfigError
from fgaif.lvlm.model import base_of
from fgaif.types import DEFAULT_KINDS, Response, Segment, TrainBatch

ALL = ("learner", "reference", "reward")
ALONE = (0, 1, "", 0)


@pytest.fixture(scope="module")
def rewards(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_samples.save_noisy(tiny_llava_dir, tmp_path_factory.mktemp("rewards"))


@pytest.fixture
def config(tiny_llava_dir: Path, tmp_path: Path) -> Config:
    anchor = {"weight": 2.0, "batch_size": 3}
    return tiny_config(tiny_llava_dir, tmp_path, anchor=anchor)


@pytest.fixture
def shared(config: Config, rewards: Path) -> SharedActor:
    return SharedActor(config, ALL, rewards, *ALONE)


@pytest.fixture
def texts(tiny_llava_dir: Path, tmp_path: Path) -> list[tuple[Response, tuple[Segment, ...]]]:
    pictures = reward_samples.images(tmp_path, 4)
    words = ["There is a dog, ", "a red star ", "left of it."]
    return [
        reward_samples.response(tiny_llava_dir, picture, words[: index % 3 + 1], index=index)
        for index, picture in enumerate(pictures)
    ]


def train(learner, reference, responses: list[Response]) -> TrainBatch:
    batch = make_train_batch(responses, learner.logprobs(responses))
    learner.update(batch, questions(responses))
    reference.update_values(batch)
    return batch


def state(learner, reference, responses: list[Response]) -> list[np.ndarray]:
    evaluations = reference.evaluate(responses)
    return [
        np.concatenate(learner.logprobs(responses)),
        np.concatenate([evaluation.values for evaluation in evaluations]),
        np.concatenate([evaluation.reference_logprobs for evaluation in evaluations]),
        *(value for _, value in sorted(learner.publish(1).tensors.items())),
    ]


def roles(actor: SharedActor) -> list:
    return [actor._roles[role] for role in ALL]


def test_scores_logprobs_values_and_an_update_are_those_of_roles_apart(
    config: Config, rewards: Path, shared: SharedActor, tmp_path: Path,
    texts: list[tuple[Response, tuple[Segment, ...]]],
) -> None:  # fmt: skip
    responses = make_responses(tmp_path, 8)
    learner, reference, reward = roles(shared)
    apart = LearnerActor(config, *ALONE), ReferenceActor(config, rewards)
    scores = [RewardActor(rewards / kind, config).score_pairs(texts) for kind in DEFAULT_KINDS]
    for together, rows in zip(reward.score_pairs(texts), zip(*scores, strict=True), strict=True):
        np.testing.assert_allclose(together, np.stack(rows, axis=1), atol=1e-5)
    train(learner, reference, responses)
    train(*apart, responses)
    for one, other in zip(
        state(learner, reference, responses), state(*apart, responses), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(state(*apart, responses)[1]).max() > 1e-3, "the update did something"


def test_the_base_and_its_features_are_there_once(shared: SharedActor, tmp_path: Path) -> None:
    learner, reference, reward = roles(shared)
    models = learner._engine.model, reference._model, reward._model.backbone
    weights = [
        {
            name.replace(".base_layer", ""): value.data_ptr()
            for name, value in base_of(model).named_parameters()
            if "lora_" not in name and ".vision_tower." not in name and "projector" not in name
        }
        for model in models
    ]
    assert len(weights[0]) > 10
    assert weights[0] == weights[1] == weights[2]
    learner.logprobs(make_responses(tmp_path, 8))
    assert len(reference._value.features) == len(reward._features) == 4


def test_roles_at_the_same_time_train_as_one_after_the_other(
    config: Config, rewards: Path, shared: SharedActor, tmp_path: Path
) -> None:
    """Bit by bit: what died while both trained is replayed in whatever order."""
    responses = make_responses(tmp_path, 8)
    other = SharedActor(config, ALL, rewards, *ALONE)
    batch = train(*roles(shared)[:2], responses)
    other.call("learner", "logprobs", responses)
    with ThreadPoolExecutor() as threads:
        calls = [
            threads.submit(other.call, "learner", "update", batch, questions(responses)),
            threads.submit(other.call, "reference", "update_values", batch),
        ]
        assert [call.result().metrics is not None for call in calls] == [True, True]
    for one, two in zip(
        state(*roles(shared)[:2], responses), state(*roles(other)[:2], responses), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_training_goes_on_in_the_other_layout(
    config: Config, rewards: Path, shared: SharedActor, tmp_path: Path
) -> None:
    """What roles apart have saved is read by a shared process, and the other way round."""
    responses = make_responses(tmp_path, 8)
    apart = LearnerActor(config, *ALONE), ReferenceActor(config, rewards)
    together = roles(shared)[:2]
    train(*apart, responses)
    for turn, (saver, reader) in enumerate([(apart, together), (together, apart)]):
        for name, one, other in zip(ALL, saver, reader, strict=False):
            one.save(tmp_path / f"{name}{turn}")
            other.restore(tmp_path / f"{name}{turn}")
        train(*saver, responses)
        train(*reader, responses)
        for one, other in zip(state(*saver, responses), state(*reader, responses), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.shared_roles=[learner]"], "two or three"),
        (["cluster.learner.gpus=1"], "set cluster.reference.gpus=1"),
        (["cluster.reward.replicas=2"], "set cluster.reward.replicas=1"),
        (["ppo.zero_stage=3"], "set ppo.zero_stage=2"),
    ],
)
def test_what_cannot_be_shared_is_refused(config: Config, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        with_overrides(config, ["cluster.layout=shared", *overrides])
