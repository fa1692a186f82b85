"""Label noise: rates, determinism, what is recorded, and that stored labels stay clean."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.pipeline.train_rewards import input_digest
from fgaif.config import Config, NoiseConfig, parse_config
from fgaif.errors import ConfigError
from fgaif.reward.checkpoint import RewardCard, _noise_card
from fgaif.reward.dataset import read_data
from fgaif.reward.label_noise import Flips, flip_labels, flip_rows
from fgaif.types import (
    DEFAULT_KINDS,
    UNKNOWN,
    ImageRef,
    LabeledResponse,
    Prompt,
    Response,
    Segment,
    SegmentClass,
)

NONE, OK, HALLU = SegmentClass
MANY = np.array([OK, HALLU, NONE, UNKNOWN] * 1000)


def row(name: str, labels: list[list[int]]) -> LabeledResponse:
    response = Response(
        prompt=Prompt(id=name, image=ImageRef(path="a.png", sha256=name), text="Describe."),
        sample=0,
        text="a" * len(labels),
        token_ids=np.arange(len(labels)),
        rollout_logprobs=np.zeros(len(labels), dtype=np.float32),
        finish="length",
        policy_version=0,
    )
    segments = tuple(
        Segment(index=i, char_start=i, char_end=i + 1, token_start=i, token_end=i + 1)
        for i in range(len(labels))
    )
    return LabeledResponse(
        response=response,
        segments=segments,
        facts=(),
        verdicts={},
        labels=np.array(labels),
        kinds=DEFAULT_KINDS,
    )


def flipped(noise: NoiseConfig, seed: int = 0, name: str = "p#0") -> np.ndarray:
    return flip_labels(MANY, "object", name, noise, seed)


@pytest.mark.parametrize(
    ("noise", "ok", "hallu"),
    [
        (NoiseConfig(), 0, 0),
        (NoiseConfig(ok_to_hallu=0.2), 0.2, 0),
        (NoiseConfig(hallu_to_ok=0.3), 0, 0.3),
        (NoiseConfig(flip=0.1), 0.1, 0.1),
        (NoiseConfig(ok_to_hallu=1.0, hallu_to_ok=1.0), 1, 1),
    ],
)
def test_rates_are_met_and_other_labels_stay(noise: NoiseConfig, ok: float, hallu: float) -> None:
    """1,000 labels of each class; four standard errors of a rate of 0.3 are 0.058."""
    after = flipped(noise)
    assert set(after[MANY == OK]) <= {OK, HALLU}
    assert (after[MANY == OK] == HALLU).mean() == pytest.approx(ok, abs=0.058 if ok % 1 else 0)
    assert (after[MANY == HALLU] == OK).mean() == pytest.approx(
        hallu, abs=0.058 if hallu % 1 else 0
    )
    for kept in (NONE, UNKNOWN):
        assert (after[kept == MANY] == kept).all()


def test_flips_depend_on_seed_response_and_kind_alone() -> None:
    noise = NoiseConfig(flip=0.3)
    first = flipped(noise)
    assert (flipped(noise) == first).all()
    assert (flipped(noise, seed=1) != first).any()
    assert (flipped(noise, name="q#0") != first).any()
    assert (flip_labels(MANY, "relation", "p#0", noise, 0) != first).any()


def test_a_higher_rate_flips_what_a_lower_one_flips_and_more() -> None:
    low, high = (flipped(NoiseConfig(flip=rate)) != MANY for rate in (0.1, 0.3))
    assert (low <= high).all()
    assert high.sum() > low.sum() > 0


def test_rows_do_not_matter_to_each_other_and_stay_clean() -> None:
    rows = [row(f"p{n}", [[OK, HALLU, OK]] * 5) for n in range(40)]
    clean = [item.labels.copy() for item in rows]
    noise = NoiseConfig(ok_to_hallu=0.5)
    noisy, flips = flip_rows(rows, "object", noise, 3)
    turned, _ = flip_rows(rows[::-1], "object", noise, 3)
    alone, _ = flip_rows(rows[7:8], "object", noise, 3)
    for item, other in zip(noisy, turned[::-1], strict=True):
        assert (item.labels == other.labels).all()
    assert (alone[0].labels == noisy[7].labels).all()
    assert all((item.labels == labels).all() for item, labels in zip(rows, clean, strict=True))
    assert all((item.labels[:, 1:] == [HALLU, OK]).all() for item in noisy)
    count = sum(int((item.labels[:, 0] == HALLU).sum()) for item in noisy)
    assert flips == Flips(ok_to_hallu=count, hallu_to_ok=0, ok=200, hallu=0)
    assert 60 < count < 140
    assert flip_rows([], "object", noise, 0) == ([], Flips())


def config(**reward: object) -> Config:
    return parse_config({"reward": reward})


def test_reward_training_reads_noisy_labels_and_the_card_says_so() -> None:
    rows = [row(f"p{n}", [[OK, HALLU, OK]] * 5) for n in range(40)]
    noisy = config(noise={"attribute": {"hallu_to_ok": 0.25}}, noise_seed=4)
    for kind in ("object", "relation"):
        assert read_data(kind, rows, noisy) == read_data(kind, rows, config())  # type: ignore[arg-type]
    data = read_data("attribute", rows, noisy)
    labels = np.concatenate([data.labels(item) for item in (*data.train, *data.val)])
    card = _noise_card("attribute", noisy, data)
    assert card is not None
    assert card.flipped_hallu == (labels == OK).sum() > 20
    assert (card.hallu, card.ok, card.flipped_ok) == (200, 0, 0)
    assert (card.hallu_to_ok, card.ok_to_hallu, card.seed) == (0.25, 0, 4)
    assert _noise_card("object", noisy, read_data("object", rows, noisy)) is None


def test_the_input_digest_covers_a_kinds_noise_and_is_unchanged_without() -> None:
    rows = [row("p", [[OK, HALLU, OK]])]

    def digest(kind: str, **reward: object) -> str:
        return input_digest(kind, rows, config(**reward), "b")  # type: ignore[arg-type]

    noise = {"attribute": {"flip": 0.1}}
    assert digest("attribute", noise=noise) != digest("attribute")
    assert digest("attribute", noise=noise, noise_seed=1) != digest("attribute", noise=noise)
    assert digest("object", noise=noise, noise_seed=1) == digest("object")
    assert digest("attribute", noise={}, noise_seed=1) == digest("attribute")


def test_cards_of_models_trained_before_are_still_read(tmp_path: Path) -> None:
    texts = dict.fromkeys(("backbone", "backbone_digest", "tokenizer_digest", "input_digest"), "x")
    card = RewardCard(kind="object", head="linear", min_words=5, metrics={}, **texts)
    old = card.model_dump(exclude={"noise"})
    assert RewardCard.model_validate(old).noise is None


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ({"object": {"flip": 0.1, "ok_to_hallu": 0.2}}, "reward.noise.object .*sets both rates"),
        ({"object": {"flip": 1.2}}, "reward.noise.object.flip = 1.2"),
        ({"objects": {"flip": 0.2}}, "reward.noise.objects"),
    ],
)
def test_impossible_noise_is_refused(noise: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(noise=noise)


def test_replaced_rows_keep_everything_but_the_labels() -> None:
    item = row("p", [[OK, OK, OK]])
    (noisy,), _ = flip_rows([item], "object", NoiseConfig(flip=1), 0)
    assert noisy.labels.tolist() == [[HALLU, OK, OK]]
    assert replace(noisy, labels=item.labels) == item
