"""Data, batches, loss and early stopping of reward training, without Ray or DeepSpeed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reward_samples
import torch

from fgaif.config import RewardConfig
from fgaif.errors import ConfigError, DataError
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.model import load_lvlm
from fgaif.reward.dataset import RewardData, class_weights, plan_batches, prepare_data
from fgaif.reward.inputs import load_reward_encoder
from fgaif.reward.local import PlainEngine
from fgaif.reward.metrics import calibration_error, reward_metrics
from fgaif.reward.model import RewardModel, new_reward_model, segment_probs
from fgaif.reward.train import TrainedReward, lr_factor, planned_steps, train_reward_model
from fgaif.types import UNKNOWN, LabeledResponse


@pytest.fixture(scope="module")
def rows(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LabeledResponse]:
    pictures = reward_samples.images(tmp_path_factory.mktemp("images"), 20)
    return reward_samples.labelled(tiny_llava_dir, pictures, 120)


def relabel(row: LabeledResponse, label: int) -> LabeledResponse:
    return replace(row, labels=np.full_like(row.labels, label))


def test_split_holds_out_whole_images_whatever_the_order(rows: list[LabeledResponse]) -> None:
    data = prepare_data("object", rows, val_fraction=0.2, seed=1)
    image = {"train": set(), "val": set()}
    for name in image:
        image[name] = {row.response.prompt.image.sha256 for row in getattr(data, name)}
    assert not image["train"] & image["val"]
    assert len(image["val"]) == 4  # of 20 images
    assert len(data.train) + len(data.val) == len(rows)
    again = prepare_data("object", rows[::-1], val_fraction=0.2, seed=1)
    assert {row.response.prompt.image.sha256 for row in again.val} == image["val"]
    other = prepare_data("object", rows, val_fraction=0.2, seed=2)
    assert {row.response.prompt.image.sha256 for row in other.val} != image["val"]


def test_unknown_labels_are_left_out_and_counted(rows: list[LabeledResponse]) -> None:
    """One response all unknown, one with its first segment unknown for the attribute only."""
    partly = next(row for row in rows[1:] if len(row.segments) > 1)
    labels = partly.labels.copy()
    labels[0, 1] = UNKNOWN
    mixed = [relabel(rows[0], UNKNOWN), replace(partly, labels=labels), *rows[10:20]]
    data = prepare_data("attribute", mixed, val_fraction=0.1, seed=0)
    assert data.unknown_segments == len(rows[0].segments) + 1
    assert data.unused_responses == 1
    assert len(data.train) + len(data.val) == 11
    assert prepare_data("object", mixed, val_fraction=0.1, seed=0).unknown_segments == len(
        rows[0].segments
    )


def test_one_image_is_not_enough(rows: list[LabeledResponse]) -> None:
    with pytest.raises(DataError, match=r"reward model object: 1 labelled responses show 1 image"):
        prepare_data("object", rows[:1], val_fraction=0.1, seed=0)


def test_class_weights_by_hand() -> None:
    """Counts 4, 1, 0: 1/2, 1, 0 times 5 / (4 * 1/2 + 1 * 1) = 5/3; unknown does not count."""
    labels = np.array([0, 0, 0, 0, 1, UNKNOWN])
    assert class_weights(labels, balance=True).tolist() == pytest.approx([5 / 6, 5 / 3, 0])
    assert class_weights(labels, balance=False).tolist() == [1, 1, 1]


def test_batches_are_full_permutations_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=64)
    batches = plan_batches(lengths.tolist(), batch_size=8, steps=20, seed=3)
    assert [len(batch) for batch in batches] == [8] * 20
    first_epoch = Counter(np.concatenate(batches[:8]).tolist())
    assert first_epoch == Counter(range(64))
    seen = Counter(np.concatenate(batches).tolist())
    assert set(seen.values()) == {2, 3}  # 160 places for 64 rows
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches[:8]])
    assert spread < np.ptp(lengths) / 4
    again = plan_batches(lengths.tolist(), batch_size=8, steps=20, seed=3)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


def test_a_batch_larger_than_the_data_repeats_rows() -> None:
    (batch,) = plan_batches([5, 3], batch_size=4, steps=1, seed=0)
    assert Counter(batch.tolist()) == {0: 2, 1: 2}


def test_learning_rate_rises_then_falls_to_zero() -> None:
    """10 steps, warm-up 2: 1/2, 1, then 0.5 (1 + cos(pi k / 8)) for k = 0 .. 7."""
    factors = [lr_factor(step, 10, 0.2) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0.0)
    assert lr_factor(0, 1, 0.0) == 1.0


def test_planned_steps() -> None:
    assert planned_steps(100, RewardConfig(epochs=2.5, batch_size=32)) == 8
    assert planned_steps(1, RewardConfig(epochs=0.1, batch_size=32)) == 1


def test_metrics_by_hand() -> None:
    """Labels N O O H H H, called N O H H H O.

    With facts: 3 of 5 right. HALLU: 2 hits of 3 called and of 3 true. Counts 1, 2, 3.
    """
    labels = np.array([0, 1, 1, 2, 2, 2])
    called = np.array([0, 1, 2, 2, 2, 1])
    metrics = reward_metrics(np.eye(3, dtype=np.float32)[called], labels)
    assert metrics.accuracy == pytest.approx(3 / 5)
    assert metrics.precision == pytest.approx(2 / 3)
    assert metrics.recall == pytest.approx(2 / 3)
    assert metrics.f1_hallu == pytest.approx(2 / 3)
    assert (metrics.none, metrics.ok, metrics.hallu) == (1, 2, 3)
    assert metrics.ece == pytest.approx(2 / 6)  # sure of all six, wrong twice


def test_metrics_without_hallucination_divide_nothing_by_zero() -> None:
    metrics = reward_metrics(np.eye(3, dtype=np.float32)[[0, 0]], np.array([0, 0]))
    assert (metrics.accuracy, metrics.f1_hallu, metrics.ece) == (0, 0, 0)
    assert reward_metrics(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)).ece == 0


def test_calibration_error_by_hand() -> None:
    """Bin .6-.7: two of .6, one right: |1 - 1.2| = .2. Bin .9-1: .9, right: .1. Sum / 3 = .1."""
    probs = np.array([[0.6, 0.4, 0], [0.6, 0.4, 0], [0.05, 0.9, 0.05]], np.float32)
    assert calibration_error(probs, np.array([0, 1, 1])) == pytest.approx(0.1, abs=1e-6)


def train(
    checkpoint: Path, data: RewardData, *, world: int = 1, **reward: object
) -> tuple[TrainedReward, RewardModel, list[tuple[int, int, dict[str, float]]]]:
    """Train in this process; with ``world`` > 1 as rank 0 of that many."""
    config = reward_samples.settings(checkpoint, **reward).reward
    encoder = load_reward_encoder(checkpoint, checkpoint, max_image_pixels=10**6)
    model = new_reward_model(
        load_lvlm(checkpoint, dtype="float32"), config.lora, config.head, seed=0
    )
    engine = PlainEngine(model, config, planned_steps(len(data.train), config), world=world)
    reports: list[tuple[int, int, dict[str, float]]] = []
    result = train_reward_model(
        data, model, engine, encoder, FeatureCache(model.backbone, encoder.encoder), config,
        seed=0, report=lambda *told: reports.append(told),
    )  # fmt: skip
    return result, model, reports


def test_training_learns_what_the_words_say(
    tiny_llava_dir: Path, rows: list[LabeledResponse]
) -> None:
    data = prepare_data("relation", rows, val_fraction=0.2, seed=0)
    result, model, reports = train(tiny_llava_dir, data, epochs=4, batch_size=8, head="mlp")
    assert result.metrics.f1_hallu > 0.9
    assert result.metrics.accuracy > 0.9
    steps = [done for done, _, _ in reports]
    assert steps == list(range(1, result.planned_steps + 1))
    validations = [figures["val_loss"] for _, _, figures in reports if "val_loss" in figures]
    assert len(validations) == 4
    assert result.val_loss == min(validations)
    # The state handed out is the best one, and gives its figures again.
    model.load_state_dict(result.state, strict=False)
    encoder = load_reward_encoder(tiny_llava_dir, tiny_llava_dir, max_image_pixels=10**6)
    probs = segment_probs(
        model.eval(), encoder, FeatureCache(model.backbone, encoder.encoder),
        [row.response for row in data.val], [row.segments for row in data.val],
        micro_batch=3, device=torch.device("cpu"),
    )  # fmt: skip
    labels = np.concatenate([data.labels(row) for row in data.val])
    again = reward_metrics(np.concatenate(probs), labels).as_floats()
    assert again == pytest.approx(result.metrics.as_floats(), abs=1e-5)


def test_micro_batches_do_not_change_the_step(
    tiny_llava_dir: Path, rows: list[LabeledResponse]
) -> None:
    data = prepare_data("object", rows[:40], val_fraction=0.2, seed=0)
    states = [
        train(tiny_llava_dir, data, epochs=0.5, evals=1, lr=1e-3, micro_batch=size)[0].state
        for size in (16, 3)
    ]
    for name in states[0]:
        assert torch.allclose(states[0][name], states[1][name], atol=1e-5), name


def test_ranks_share_a_batch_and_their_mean_is_its_gradient(
    tiny_llava_dir: Path, rows: list[LabeledResponse]
) -> None:
    """Mean over 2 ranks of each rank's gradient equals the gradient of one rank with all rows."""
    data = prepare_data("object", rows[:40], val_fraction=0.2, seed=0)
    gradients = []

    class Spy(PlainEngine):
        def step(self) -> None:
            if self.steps == 0:
                gradients.append(self.model.head.weight.grad.clone())
            super().step()

    config = reward_samples.settings(tiny_llava_dir, epochs=0.5, evals=1).reward
    encoder = load_reward_encoder(tiny_llava_dir, tiny_llava_dir, max_image_pixels=10**6)
    for rank, world in [(0, 1), (0, 2), (1, 2)]:
        model = new_reward_model(
            load_lvlm(tiny_llava_dir, dtype="float32"), config.lora, config.head, seed=0
        )
        engine = Spy(model, config, planned_steps(len(data.train), config), rank, world)
        features = FeatureCache(model.backbone, encoder.encoder)
        train_reward_model(
            data, model, engine, encoder, features, config, seed=0, report=lambda *told: None
        )
    alone, first, second = gradients
    assert torch.allclose(alone, (first + second) / 2, atol=1e-6)
    assert not torch.allclose(first, second, atol=1e-3)


def test_training_stops_early_and_keeps_the_best_state(
    tiny_llava_dir: Path, rows: list[LabeledResponse]
) -> None:
    """Validation rows whose labels are turned round: the better the fit, the worse their loss."""
    data = prepare_data("object", rows, val_fraction=0.2, seed=0)
    swapped = tuple(
        replace(row, labels=np.array([0, 2, 1])[row.labels].astype(np.int64)) for row in data.val
    )
    data = replace(data, val=swapped)
    result, _, reports = train(tiny_llava_dir, data, epochs=12, evals=12, patience=2)
    assert len(reports) < result.planned_steps
    validations = [figures["val_loss"] for _, _, figures in reports if "val_loss" in figures]
    assert result.val_loss == min(validations)
    assert validations.index(min(validations)) == len(validations) - 3


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_diverging_run_says_so(tiny_llava_dir: Path, rows: list[LabeledResponse]) -> None:
    data = prepare_data("object", rows[:20], val_fraction=0.2, seed=0)
    with pytest.raises(DataError, match=r"lower reward\.lr"):
        train(tiny_llava_dir, data, lr=1e30, epochs=1, evals=1)


def test_batches_must_divide_among_workers(tiny_llava_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.batch_size = 16 is not a multiple"):
        reward_samples.settings(tiny_llava_dir, workers=3)
