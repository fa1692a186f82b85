"""Dense rewards, checked by hand."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fgaif.config import RewardShapeConfig
from fgaif.errors import DataError
from fgaif.reward.dense import (
    RewardCenters,
    counts_in_order,
    dense_rewards,
    own_rewards,
    segment_penalties,
    segment_values,
    terminal_reward,
    token_rewards,
    update_centers,
)
from fgaif.types import DEFAULT_KINDS, ImageRef, Prompt, Response, Segment, SegmentScores

PLAIN = RewardShapeConfig(values="hard", center=False, repeat_penalty=0.0, no_stop_penalty=0.0)
FRESH = RewardCenters.empty(DEFAULT_KINDS)


def shape(**changes: Any) -> RewardShapeConfig:
    return PLAIN.model_copy(update=changes)


def pieces(*ends: int, chars: int = 10) -> list[Segment]:
    starts = [0, *ends[:-1]]
    return [
        Segment(index=i, char_start=i * chars, char_end=(i + 1) * chars, token_start=a, token_end=b)
        for i, (a, b) in enumerate(zip(starts, ends, strict=True))
    ]


def response(length: int, text: str = "", finish: Any = "stop") -> Response:
    prompt = Prompt(id="p", image=ImageRef(path="x.png", sha256="0"), text="Describe.")
    return Response(
        prompt=prompt,
        sample=0,
        text=text,
        token_ids=np.zeros(length, np.int64),
        rollout_logprobs=np.zeros(length, np.float32),
        finish=finish,
        policy_version=0,
    )


def probs(*rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_rewards_land_on_the_last_token_of_each_segment() -> None:
    """Segments end at tokens 2 and 4 of 6; weights 1, 2, .5; values as below.

    r_2 = 1 - 2 + 0 = -1;  r_4 = 1 + 2 * 1 + .5 * -1 = 2.5;  all others 0.
    """
    values = np.array([[1, -1, 0], [1, 1, -1]], np.float32)
    weights = np.array([1, 2, 0.5], np.float32)
    rewards = token_rewards(6, pieces(3, 5), values, weights)
    assert rewards.tolist() == [0, 0, -1, 0, 2.5, 0]
    # The reference's placement (first token of the next piece) would shift both by one.
    assert rewards[3] == 0
    assert rewards[5] == 0


def test_coarse_placement_moves_the_same_sum_to_the_last_token() -> None:
    values = np.array([[1, -1, 0], [1, 1, -1]], np.float32)
    weights = np.array([1, 2, 0.5], np.float32)
    rewards = token_rewards(6, pieces(3, 5), values, weights, placement="last")
    assert rewards.tolist() == [0, 0, 0, 0, 0, 1.5]


def test_spread_placement_divides_a_segment_s_sum_among_its_tokens() -> None:
    values, weights = np.array([[1.0], [-1.0]], np.float32), np.array([2.0], np.float32)
    rewards = token_rewards(6, pieces(4, 5), values, weights, placement="spread", terminal=-1.0)
    np.testing.assert_allclose(rewards, [0.5, 0.5, 0.5, 0.5, -2.0, -1.0])


def test_every_token_knows_its_segment_s_reward() -> None:
    own = own_rewards(6, pieces(3, 5), np.array([0.5, -1.0], np.float32))
    np.testing.assert_array_equal(own, np.array([0.5, 0.5, 0.5, -1.0, -1.0, 0.0], np.float32))


def test_penalties_and_terminal_terms_are_subtracted_where_they_belong() -> None:
    """r_1 = 1 - .5 (penalty of segment 0); r_3 = 0 - 2 (terminal)."""
    values = np.array([[1, 0, 0]], np.float32)
    rewards = token_rewards(
        4, pieces(2), values, np.ones(3, np.float32),
        penalties=np.array([0.5], np.float32), terminal=-2.0,
    )  # fmt: skip
    assert rewards.tolist() == [0, 0.5, 0, -2]


def test_a_segment_without_tokens_of_its_own_pays_at_the_token_before() -> None:
    values = np.array([[1, 0, 0], [1, 0, 0]], np.float32)
    rewards = token_rewards(2, pieces(0, 9), values, np.ones(3, np.float32))
    assert rewards.tolist() == [1, 1]


@pytest.mark.parametrize("length", [0, 3])
def test_no_segments_give_zero_rewards(length: int) -> None:
    empty = np.zeros((0, 3), np.float32)
    assert token_rewards(length, [], empty, np.ones(3, np.float32)).tolist() == [0.0] * length


def test_hard_values_are_those_of_the_most_likely_class() -> None:
    p = probs([[0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.2, 0.3, 0.5]])
    assert segment_values(p, PLAIN, np.zeros(3, np.float32)).tolist() == [[0, 1, -1]]


def test_soft_values_are_expected_values() -> None:
    """.5 * 2 + .3 * -1 + .2 * .5 = .8 for every kind."""
    p = probs([[0.2, 0.5, 0.3]] * 3)
    soft = shape(values="soft", value_ok=2.0, value_hallu=-1.0, value_none=0.5)
    assert segment_values(p, soft, np.zeros(3, np.float32)) == pytest.approx(0.8)


def test_centering_spares_segments_without_facts() -> None:
    """mu = .4, off = -.2: OK 1 - .2 = .8, HALLU -1 - .2 = -1.2, NONE 0.

    The wrong formulas (mean without offset, or subtracted from NONE too) give .6 and -.2.
    """
    p = probs([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    centred = shape(center=True, center_offset=-0.2)
    values = segment_values(p, centred, np.full(3, 0.4, np.float32))
    assert values[0] == pytest.approx([0.8, -1.2, 0.0])


def test_soft_centred_value_by_hand() -> None:
    """(.5 - .3) - (.25 - .2) * .8 = .16."""
    p = probs([[0.2, 0.5, 0.3]] * 3)
    values = segment_values(p, shape(values="soft", center=True), np.full(3, 0.25, np.float32))
    assert values == pytest.approx(0.16, abs=1e-6)


def test_centers_are_means_over_segments_with_facts_and_move_by_momentum() -> None:
    """Object: (.9 + .3 - .1 - .5) / 1.8 = 1/3 (not /2); attribute has no facts; relation is OK.

    Second batch, object HALLU: .8 / 3 - .2 = 1/15; relation has no facts and keeps 1.
    """
    soft = shape(values="soft", center_momentum=0.8)
    first = SegmentScores(
        probs=probs(
            [[0, 0.9, 0.1], [1, 0, 0], [0, 1, 0]],
            [[0.2, 0.3, 0.5], [1, 0, 0], [1, 0, 0]],
        )
    )
    centers = update_centers(FRESH, [first], soft)
    assert centers.means == (pytest.approx(1 / 3), None, pytest.approx(1.0))
    assert centers.array().tolist() == pytest.approx([1 / 3, 0, 1])
    second = SegmentScores(probs=probs([[0, 0, 1], [0, 0, 1], [1, 0, 0]]))
    moved = update_centers(centers, [second], soft)
    assert moved.means == (pytest.approx(1 / 15), pytest.approx(-1.0), pytest.approx(1.0))
    assert RewardCenters.from_json(json.loads(json.dumps(moved.to_json()))) == moved


def test_centers_survive_a_batch_without_segments() -> None:
    empty = SegmentScores(probs=np.zeros((0, 3, 3), np.float32))
    assert update_centers(FRESH, [empty], PLAIN) == FRESH
    assert update_centers(FRESH, [], PLAIN) == RewardCenters.empty(DEFAULT_KINDS)


def test_repeated_and_malformed_segments_pay_once() -> None:
    text = "A red dog. a red dog, A blue cat"
    cuts = [(0, 11), (11, 22), (22, 32)]
    segments = [
        Segment(index=i, char_start=a, char_end=b, token_start=i, token_end=i + 1)
        for i, (a, b) in enumerate(cuts)
    ]
    assert segment_penalties(text, segments, {1, 2}, 0.5).tolist() == [0, 0.5, 0.5]
    assert segment_penalties(text, segments, (), 0.5).tolist() == [0, 0.5, 0]


@pytest.mark.parametrize(("finish", "expected"), [("stop", -0.1 * 5), ("length", -1.0 - 0.1 * 5)])
def test_terminal_terms(finish: str, expected: float) -> None:
    settings = shape(no_stop_penalty=1.0, length_penalty=0.1, length_target=5)
    assert terminal_reward(response(10, finish=finish), settings) == pytest.approx(expected)
    assert terminal_reward(response(4), settings) == 0.0


def test_dense_rewards_keep_their_parts() -> None:
    """First response: OK object at token 1, HALLU object at token 3 which also repeats.

    mu = 0, off = -.2: values 1.2 and -.8, weights (2, 1, 1): 2.4 and -1.6 - .5 = -2.1; never
    ended: -1 at token 4. The second response has no segments.
    """
    settings = shape(
        center=True,
        repeat_penalty=0.5,
        no_stop_penalty=1.0,
        weights={"object": 2.0, "attribute": 1.0, "relation": 1.0},
    )
    scores = [
        SegmentScores(
            probs=probs([[0, 1, 0], [1, 0, 0], [1, 0, 0]], [[0, 0, 1], *[[1, 0, 0]] * 2])
        ),
        SegmentScores(probs=np.zeros((0, 3, 3), np.float32)),
    ]
    responses = [response(5, "a dog runsA dog runs", "length"), response(1)]
    result = dense_rewards(
        responses,
        [pieces(2, 4), []],
        scores,
        [(), ()],
        settings,
        FRESH,
    )
    assert result.tokens[0] == pytest.approx([0, 2.4, 0, -2.1, -1.0])
    assert result.tokens[1].tolist() == [0]
    assert result.values[0][:, 0] == pytest.approx([1.2, -0.8])
    assert result.penalties[0].tolist() == [0, 0.5]
    assert result.terminal == (-1.0, 0.0)
    assert result.centers.means == (0.0, None, None)


def test_a_kind_without_weight_leaves_no_trace() -> None:
    settings = shape(weights={"attribute": 1.0})
    score = SegmentScores(probs=probs([[0, 0, 1], [0, 1, 0], [0, 0, 1]]))
    result = dense_rewards(
        [response(2, "0123456789")],
        [pieces(2)],
        [score],
        [()],
        settings,
        FRESH,
    )
    assert result.tokens[0].tolist() == [0, 1]


def test_without_an_order_every_kind_counts() -> None:
    p = probs([[0, 0, 1], [0, 0, 1], [0, 1, 0]])
    assert counts_in_order(p, RewardShapeConfig(), DEFAULT_KINDS).tolist() == [[1, 1, 1]]


def test_a_later_kind_counts_only_where_the_earlier_ones_are_clean() -> None:
    """Worked by hand: object first, then relation; attribute is not in the order."""
    shape = PLAIN.model_copy(update={"order": ("object", "relation")})
    fine, wrong, none = [0, 1, 0], [0, 0, 1], [1, 0, 0]
    p = np.stack([
        np.array([wrong, fine, fine], np.float32),
        np.array([fine, wrong, wrong], np.float32),
        np.array([none, fine, fine], np.float32),
    ])  # fmt: skip
    assert counts_in_order(p, shape, DEFAULT_KINDS).tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    result = dense_rewards(
        [response(6)], [pieces(2, 4, 6)], [SegmentScores(probs=p)], [()], shape, FRESH
    )
    assert result.values[0].tolist() == [[-1, 1, 0], [1, -1, -1], [0, 1, 1]]
    assert result.tokens[0].tolist() == [0, 0, 0, -1, 0, 2]


def test_every_earlier_kind_must_be_clean_whatever_the_columns_order() -> None:
    shape = RewardShapeConfig(order=("relation", "object", "attribute"))
    p = probs([[0, 1, 0], [0, 1, 0], [0, 0, 1]])  # only the relation is wrong
    assert counts_in_order(p, shape, DEFAULT_KINDS).tolist() == [[0, 0, 1]]


def test_on_the_last_token_one_wrong_segment_holds_back_the_whole_response() -> None:
    shape = PLAIN.model_copy(update={"order": ("object", "relation"), "placement": "last"})
    fine, wrong = [0, 1, 0], [0, 0, 1]
    p = np.array([[wrong, fine, fine], [fine, fine, fine]], np.float32)
    assert counts_in_order(p, shape, DEFAULT_KINDS).tolist() == [[1, 1, 0], [1, 1, 0]]
    result = dense_rewards(
        [response(4)], [pieces(2, 4)], [SegmentScores(probs=p)], [()], shape, FRESH
    )
    assert result.tokens[0].tolist() == [0, 0, 0, 2]


def test_centres_without_a_mean_for_each_kind_are_refused() -> None:
    with pytest.raises(DataError, match="2 means for the kinds object, attribute, relation"):
        RewardCenters(means=(0.0, 0.0))


@pytest.mark.parametrize(
    ("answer", "said", "reward"),
    [
        ("yes", "Yes, there is a dog.", 2.0),
        ("yes", "No.", -0.5),
        ("No", "no", 2.0),
        ("B", "(B) a house", 2.0),
        ("B", "A house is B.", -0.5),
        ("yes", "", -0.5),
        ("", "Yes.", 0.0),
    ],
)
def test_an_answer_that_one_word_tells_is_paid_for(answer: str, said: str, reward: float) -> None:
    prompt = Prompt(id="p", image=ImageRef(path="x.png", sha256="0"), text="?", answer=answer)
    asked = replace(response(3, said), prompt=prompt)
    symbolic = shape(correct_bonus=2.0, wrong_penalty=0.5)
    assert terminal_reward(asked, symbolic) == reward
    assert terminal_reward(asked, PLAIN) == 0
    found = dense_rewards([asked], [[]], [SegmentScores(probs=probs()[:0].reshape(0, 3, 3))], [()],
                          symbolic, FRESH)  # fmt: skip
    assert found.tokens[0].tolist() == [0.0, 0.0, reward]
