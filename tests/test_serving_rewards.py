"""The service's rewards are PPO's before centring, with the shape in the reward models' cards."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fgaif.config import RewardShapeConfig, load_config
from fgaif.errors import CheckpointError
from fgaif.reward.checkpoint import (
    CARD,
    RewardCard,
    common_shape,
    read_card,
    record_shape,
)
from fgaif.reward.dense import RewardCenters, dense_rewards, segment_values
from fgaif.serving.scoring import ScoredText, text_result
from fgaif.serving.shape import served_shape, shape_note
from fgaif.types import (
    DEFAULT_KINDS,
    FloatArray,
    ImageRef,
    Prompt,
    Response,
    Segment,
    SegmentClass,
    SegmentScores,
)

SENTENCES = ("A dog. ", "A red cat. ", "A dog! ", "Hm. ", "It sits.")
MALFORMED = (3,)  # and the third repeats the first
EXAMPLE = np.array([[[0, 0.4, 0.6], [1, 0, 0], [1, 0, 0]]], np.float32)


def sampled(probs: FloatArray) -> tuple[Response, tuple[Segment, ...], SegmentScores]:
    """A response of the sentences, three tokens each and EOS, with the probabilities."""
    ends = list(itertools.accumulate(len(sentence) for sentence in SENTENCES[: len(probs)]))
    segments = tuple(
        Segment(index=i, char_start=start, char_end=end, token_start=3 * i, token_end=3 * i + 3)
        for i, (start, end) in enumerate(itertools.pairwise([0, *ends]))
    )
    length = 3 * len(segments) + 1
    response = Response(
        prompt=Prompt(id="p", image=ImageRef(path="x.png", sha256="0"), text="Describe."),
        sample=0,
        text="".join(SENTENCES[: len(probs)]),
        token_ids=np.zeros(length, np.int64),
        rollout_logprobs=np.zeros(length, np.float32),
        finish="stop",
        policy_version=0,
    )
    return response, segments, SegmentScores(probs=probs)


def random_probs() -> FloatArray:
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(len(SegmentClass)), (len(SENTENCES), len(DEFAULT_KINDS))).astype(
        np.float32
    )


def served(probs: FloatArray, shape: RewardShapeConfig) -> Any:
    response, segments, _ = sampled(probs)
    malformed = tuple(index for index in MALFORMED if index < len(segments))
    scored = ScoredText(
        text=response.text,
        segments=segments,
        kinds=DEFAULT_KINDS,
        probs=probs,
        malformed=malformed,
    )
    return text_result(scored, shape)


@pytest.mark.parametrize("values", ["soft", "hard"])
@pytest.mark.parametrize("points", [(1.0, -1.0, 0.0), (0.5, -3.0, 0.25), (0.0, -1.0, -0.1)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 2.0, 0.3)])
@pytest.mark.parametrize("repeat_penalty", [0.0, 0.5])
@pytest.mark.parametrize("center", [False, True])
def test_rewards_of_segments_are_those_of_ppo_before_centring(
    values: Any,
    points: tuple[float, float, float],
    weights: tuple[float, ...],
    repeat_penalty: float,
    center: bool,
) -> None:
    ok, hallu, none = points
    shape = RewardShapeConfig(
        values=values, value_ok=ok, value_hallu=hallu, value_none=none, center=center,
        weights=dict(zip(DEFAULT_KINDS, weights, strict=True)), repeat_penalty=repeat_penalty,
    )  # fmt: skip
    probs = random_probs()
    response, segments, scores = sampled(probs)
    plain = shape.model_copy(update={"center": False})
    ppo = dense_rewards([response], [segments], [scores], [MALFORMED], plain, RewardCenters.empty())
    result = served(probs, shape)
    at_ends = [float(ppo.tokens[0][segment.token_end - 1]) for segment in segments]
    assert [segment.reward for segment in result.segments] == at_ends
    assert result.total == pytest.approx(float(ppo.tokens[0].sum()), abs=1e-5)
    assert [segment.penalty for segment in result.segments] == ppo.penalties[0].tolist()
    assert result.penalty == 2 * repeat_penalty
    weighted = ppo.values[0] * np.array(weights, np.float32)
    for segment, row in zip(result.segments, weighted, strict=True):
        assert [segment.kinds[kind].reward for kind in DEFAULT_KINDS] == row.tolist()
    assert list(result.rewards.values()) == pytest.approx(weighted.sum(0).tolist(), abs=1e-5)
    # What centring takes away in a run is the centre's share alone.
    mu = np.array([0.3, -0.2, 0.1], np.float32)
    one_hot = np.eye(3, dtype=np.float32)[probs.argmax(-1)] if values == "hard" else probs
    facts = one_hot[..., SegmentClass.OK] + one_hot[..., SegmentClass.HALLU]
    share = (mu + shape.center_offset) * facts if center else 0.0
    assert segment_values(probs, shape, mu) == pytest.approx(ppo.values[0] - share, abs=1e-5)


@pytest.mark.parametrize("placement", ["segment", "last"])
def test_an_order_of_kinds_counts_as_in_ppo(placement: Any) -> None:
    shape = RewardShapeConfig(order=("relation", "object"), placement=placement)
    probs = random_probs()
    response, segments, scores = sampled(probs)
    ppo = dense_rewards(
        [response], [segments], [scores], [MALFORMED],
        shape.model_copy(update={"center": False}), RewardCenters.empty(DEFAULT_KINDS),
    )  # fmt: skip
    result = served(probs, shape)
    found = [[segment.kinds[kind].reward for kind in DEFAULT_KINDS] for segment in result.segments]
    assert found == ppo.values[0].tolist()
    assert result.total == pytest.approx(float(ppo.tokens[0].sum()), abs=1e-5)
    free = [segment.reward for segment in served(probs, RewardShapeConfig()).segments]
    assert [segment.reward for segment in result.segments] != free


def test_a_hard_shape_with_a_dear_hallucination() -> None:
    """The likeliest class of (0, .4, .6) is HALLU, worth -3; the soft default says .4 - .6."""
    hard = RewardShapeConfig(values="hard", value_hallu=-3.0)
    assert served(EXAMPLE, hard).total == -3.0
    assert served(EXAMPLE, RewardShapeConfig()).total == pytest.approx(-0.2)


def card(kind: Any, shape: RewardShapeConfig | None) -> RewardCard:
    texts = dict.fromkeys(("backbone", "backbone_digest", "tokenizer_digest", "input_digest"), "x")
    return RewardCard(kind=kind, head="linear", min_words=5, shape=shape, metrics={}, **texts)


def test_the_shape_is_that_of_the_cards_unless_the_configuration_is_asked_for() -> None:
    hard = RewardShapeConfig(values="hard", value_hallu=-3.0)
    trained = [card(kind, hard) for kind in DEFAULT_KINDS]
    old = [card(kind, None) for kind in DEFAULT_KINDS]
    config = load_config(None, ["ppo.shape.value_ok=2"])
    assert served_shape(trained, config) == (hard, "card")
    assert served_shape(old, config) == (RewardShapeConfig(), "default")
    note = shape_note(trained, config)
    assert "values soft, value_ok 2.0, value_hallu -1.0 (serve.shape=config takes it)" in note
    assert "differs" not in shape_note(
        trained, load_config(None, ["ppo.shape.values=hard", "ppo.shape.value_hallu=-3"])
    )
    own = load_config(None, ["ppo.shape.value_ok=2", "serve.shape=config"])
    assert served_shape(trained, own) == (own.ppo.shape, "config")


def test_cards_of_different_shapes_are_refused() -> None:
    cards = [
        card(kind, RewardShapeConfig(value_hallu=-1.0 - (kind == "relation")))
        for kind in DEFAULT_KINDS
    ]
    with pytest.raises(
        CheckpointError, match=r"ppo\.shape\.value_hallu.*'relation': -2\.0.*serve\.shape"
    ):
        common_shape(cards)
    with pytest.raises(CheckpointError, match=r"value_hallu"):
        served_shape(cards, load_config(None))
    served_shape(cards, load_config(None, ["serve.shape=config"]))
    # A card without a shape has the default one.
    assert common_shape([card("object", None), card("relation", RewardShapeConfig())]) == (
        RewardShapeConfig()
    )
    with pytest.raises(CheckpointError, match=r"ppo\.shape\.values"):
        common_shape([card("object", None), card("relation", RewardShapeConfig(values="hard"))])


def test_a_kept_model_gets_the_shape_of_the_present_configuration(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(
        card("object", None).model_dump_json(exclude={"shape"}), encoding="utf-8"
    )
    hard = RewardShapeConfig(values="hard")
    assert read_card(tmp_path).shape is None
    record_shape(tmp_path, hard)
    assert read_card(tmp_path) == card("object", hard)
    before = (tmp_path / CARD).stat().st_mtime_ns
    record_shape(tmp_path, hard)
    assert (tmp_path / CARD).stat().st_mtime_ns == before
