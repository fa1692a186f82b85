"""From class probabilities per segment to one reward per token.

    r_t = sum_i 1[t = T_i] (sum_k w_k v_{i,k} - c_i)  +  1[t = T - 1] e

with T_i the last sampled token of segment i, v_{i,k} the value of segment i for kind k, c_i the
penalty of a repeated or malformed segment and e the terms of the whole response (no stop, length,
and what a preference model pays for it).
The KL term is not here: it belongs to PPO. Parent formula: Wu et al. 2023, section 4; FGAIF sums
over the kinds. ``shape.order`` makes the sum piecewise, as one puts honesty before helpfulness: the
value of a kind is 0 where one before it is hallucinated. Adding +1 per correct segment makes a
policy write long, repetitive captions, penalties alone make it write short ones: hence the centred
value.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from fgaif.config import RewardShapeConfig
from fgaif.errors import DataError
from fgaif.types import (
    DEFAULT_KINDS,
    FloatArray,
    Json,
    Kind,
    Response,
    Segment,
    SegmentClass,
    SegmentScores,
)

# Below this mass of "has facts" in a batch a mean would be noise.
_MIN_FACTS = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCenters:
    """Running mean reward mu_k of segments with facts, per kind; None before the first batch."""

    means: tuple[float | None, ...]
    kinds: tuple[Kind, ...] = DEFAULT_KINDS

    def __post_init__(self) -> None:
        if len(self.means) != len(self.kinds):
            raise DataError(
                f"centres: {len(self.means)} means for the kinds {', '.join(self.kinds)}; give one "
                "for each"
            )

    @classmethod
    def empty(cls, kinds: Sequence[Kind] = DEFAULT_KINDS) -> Self:
        """Centres that have seen nothing."""
        return cls(kinds=tuple(kinds), means=(None,) * len(kinds))

    @classmethod
    def from_json(cls, state: Json) -> Self:
        """Read what ``to_json`` wrote."""
        kinds = state.get("kinds", DEFAULT_KINDS)  # earlier versions named none
        return cls(kinds=tuple(kinds), means=tuple(state["means"]))

    def to_json(self) -> Json:
        """State for a checkpoint."""
        return {"kinds": list(self.kinds), "means": list(self.means)}

    def array(self) -> FloatArray:
        """mu (K,), 0 for a kind not seen yet."""
        return np.array([mean or 0.0 for mean in self.means], dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseRewards:
    """Rewards of a batch with their parts, one entry per response.

    ``tokens`` (T,) is what PPO gets; ``own`` (T,) the reward of the segment that a token is of, 0
    for tokens of none; ``values`` (S, K) are unweighted v_{i,k}, 0 where the order of kinds lets
    them not count; ``penalties`` (S,) are c_i >= 0; ``terminal`` is e; ``centers`` are the
    means after this batch.
    """

    tokens: tuple[FloatArray, ...]
    own: tuple[FloatArray, ...]
    values: tuple[FloatArray, ...]
    penalties: tuple[FloatArray, ...]
    terminal: tuple[float, ...]
    centers: RewardCenters


def dense_rewards(
    responses: Sequence[Response],
    segments: Sequence[Sequence[Segment]],
    scores: Sequence[SegmentScores],
    malformed: Sequence[Collection[int]],
    shape: RewardShapeConfig,
    centers: RewardCenters,
) -> DenseRewards:
    """Turn the scores of a batch into rewards per token; ``malformed`` holds segment indexes.

    The columns of the scores are the kinds of the centres. These are moved by this batch before
    they are used, so the first batch is centred too.
    """
    centers = update_centers(centers, scores, shape)
    mu = centers.array()
    kinds = centers.kinds
    values = tuple(ordered_values(score.probs, shape, mu, kinds) for score in scores)
    penalties = tuple(
        segment_penalties(response.text, pieces, bad, shape.repeat_penalty)
        for response, pieces, bad in zip(responses, segments, malformed, strict=True)
    )
    terminal = tuple(
        terminal_reward(response, shape) + score.reward
        for response, score in zip(responses, scores, strict=True)
    )
    weights = kind_weights(shape, kinds)
    tokens = tuple(
        token_rewards(
            len(response.token_ids), pieces, value, weights,
            penalties=penalty, terminal=end, placement=shape.placement,
        )
        for response, pieces, value, penalty, end in zip(
            responses, segments, values, penalties, terminal, strict=True
        )
    )  # fmt: skip
    own = tuple(
        own_rewards(len(response.token_ids), pieces, segment_rewards(value, weights, penalty))
        for response, pieces, value, penalty in zip(
            responses, segments, values, penalties, strict=True
        )
    )
    return DenseRewards(
        tokens=tokens,
        own=own,
        values=values,
        penalties=penalties,
        terminal=terminal,
        centers=centers,
    )


def segment_values(probs: FloatArray, shape: RewardShapeConfig, centers: FloatArray) -> FloatArray:
    """Value of each segment for each kind, (S, K, C) and mu (K,) -> (S, K).

        v_{i,k} = p_OK ok + p_HALLU hallu + p_NONE none  -  (mu_k + offset) (p_OK + p_HALLU)

    with p of segment i and kind k. The second part is absent without ``shape.center``; it leaves
    segments without facts alone, so a fact stated as well as usual earns -offset, not +1.
    """
    p = _hard_or_soft(probs, shape.values)
    p_none, p_ok, p_hallu = (p[..., c] for c in SegmentClass)
    value = p_ok * shape.value_ok + p_hallu * shape.value_hallu + p_none * shape.value_none
    if shape.center:
        value = value - (centers + shape.center_offset) * (p_ok + p_hallu)
    return value.astype(np.float32)


def ordered_values(
    probs: FloatArray, shape: RewardShapeConfig, centers: FloatArray, kinds: Sequence[Kind]
) -> FloatArray:
    """``segment_values``, 0 where ``counts_in_order`` says so, (S, K, C) and mu (K,) -> (S, K)."""
    return segment_values(probs, shape, centers) * counts_in_order(probs, shape, kinds)


def uncentered_values(
    probs: FloatArray, shape: RewardShapeConfig, kinds: Sequence[Kind]
) -> FloatArray:
    """Value of each segment for each kind without the run's centres, (S, K, C) -> (S, K).

    What ``segment_values`` gives with ``shape.center`` off, 0 where the order of kinds lets it not
    count: a function of the probabilities alone.
    """
    plain = shape.model_copy(update={"center": False})
    return ordered_values(probs, plain, np.zeros(probs.shape[1], dtype=np.float32), kinds)


def segment_rewards(
    values: FloatArray, weights: FloatArray, penalties: FloatArray | None = None
) -> FloatArray:
    """Reward (S,) of each segment from values (S, K), weights (K,) and penalties (S,).

    sum_k w_k v_{i,k} - c_i
    """
    return values @ weights - (0.0 if penalties is None else penalties)


def kind_weights(shape: RewardShapeConfig, kinds: Sequence[Kind]) -> FloatArray:
    """w (K,), 0 for a kind without a weight."""
    return np.array([shape.weight(kind) for kind in kinds], dtype=np.float32)


def counts_in_order(
    probs: FloatArray, shape: RewardShapeConfig, kinds: Sequence[Kind]
) -> FloatArray:
    """Which values count, (S, K, C) -> (S, K) of ones and zeros; all do without ``shape.order``.

        g_{i,k} = prod over j before k in the order of 1[argmax_c p_{i,j} is not HALLU]

    A kind that is not in the order always counts. The unit is where the reward lands: a segment, or
    with ``placement="last"`` the response, in which one hallucinated segment is enough.
    """
    counts = np.ones(probs.shape[:2], dtype=np.float32)
    wrong = probs.argmax(axis=2) == SegmentClass.HALLU
    if shape.placement == "last":
        wrong = np.broadcast_to(wrong.any(axis=0), wrong.shape)
    clean = np.ones(len(probs), dtype=bool)
    for kind in shape.order:
        column = kinds.index(kind)
        counts[:, column] = clean
        clean = clean & ~wrong[:, column]
    return counts


def update_centers(
    centers: RewardCenters, scores: Sequence[SegmentScores], shape: RewardShapeConfig
) -> RewardCenters:
    """Move mu_k towards the batch's mean reward of segments with facts.

        m_k = sum_i (p_OK ok + p_HALLU hallu) / sum_i (p_OK + p_HALLU)
        mu_k <- momentum mu_k + (1 - momentum) m_k;   mu_k <- m_k at the first batch

    over all segments i of the batch. A kind without facts in the batch keeps its mean.
    """
    rows = [_hard_or_soft(score.probs, shape.values) for score in scores]
    none = np.zeros((0, len(centers.kinds), len(SegmentClass)), np.float32)
    p = np.concatenate([none, *rows])
    p_ok, p_hallu = p[..., SegmentClass.OK].sum(0), p[..., SegmentClass.HALLU].sum(0)
    means: list[float | None] = []
    for old, ok, hallu in zip(centers.means, p_ok.tolist(), p_hallu.tolist(), strict=True):
        if ok + hallu < _MIN_FACTS:
            means.append(old)
            continue
        mean = (ok * shape.value_ok + hallu * shape.value_hallu) / (ok + hallu)
        keep = 0.0 if old is None else shape.center_momentum
        means.append(keep * (old or 0.0) + (1.0 - keep) * mean)
    return RewardCenters(kinds=centers.kinds, means=tuple(means))


def segment_penalties(
    text: str, segments: Sequence[Segment], malformed: Collection[int], penalty: float
) -> FloatArray:
    """c (S,): ``penalty`` for a segment that repeats an earlier one or is malformed, else 0.

    Two segments repeat when their words are equal, whatever their case and punctuation.
    """
    seen: set[str] = set()
    costs = np.zeros(len(segments), dtype=np.float32)
    for index, segment in enumerate(segments):
        words = " ".join(re.findall(r"\w+", text[segment.char_start : segment.char_end].lower()))
        if index in malformed or words in seen:
            costs[index] = penalty
        if words:
            seen.add(words)
    return costs


def terminal_reward(response: Response, shape: RewardShapeConfig) -> float:
    """e = -no_stop [the response never ended] - length_penalty max(0, T - length_target), and what
    :func:`answer_reward` gives."""
    ended = end_reward(response.finish == "stop", len(response.token_ids), shape)
    return ended + answer_reward(response, shape)


def end_reward(ended: bool, length: int, shape: RewardShapeConfig) -> float:
    """As :func:`terminal_reward`, of a response of ``length`` tokens."""
    excess = max(0, length - shape.length_target)
    return -shape.no_stop_penalty * (not ended) - shape.length_penalty * excess


def answer_reward(response: Response, shape: RewardShapeConfig) -> float:
    """Correctness of an answer that one word tells: bonus where the response begins with it, minus
    the penalty where it begins otherwise, 0 where the prompt has none."""
    wanted = re.findall(r"\w+", response.prompt.answer.lower())
    if not wanted:
        return 0.0
    said = re.findall(r"\w+", response.text.lower())[: len(wanted)]
    return shape.correct_bonus if said == wanted else -shape.wrong_penalty


def token_rewards(
    length: int,
    segments: Sequence[Segment],
    values: FloatArray,
    weights: FloatArray,
    *,
    penalties: FloatArray | None = None,
    terminal: float = 0.0,
    placement: Literal["segment", "spread", "last"] = "segment",
) -> FloatArray:
    """Rewards (T,) of a response of ``length`` T tokens from values (S, K) and weights (K,).

        r_t = sum_i 1[t = T_i] (sum_k w_k v_{i,k} - c_i) + 1[t = T - 1] e,  T_i = token_end_i - 1

    ``placement="last"`` puts every segment's sum on t = T - 1 (the coarse control), ``"spread"``
    divides it among the segment's tokens.
    """
    rewards = np.zeros(length, dtype=np.float32)
    if length == 0:
        return rewards
    sums = segment_rewards(values, weights, penalties)
    for segment, reward in zip(segments, sums, strict=True):
        tokens = segment.token_end - segment.token_start
        if placement == "spread" and tokens > 0:
            rewards[segment.token_start : segment.token_end] += reward / np.float32(tokens)
            continue
        # A piece of white space may own no token of its own: its end is then the token before.
        end = length - 1 if placement == "last" else min(max(segment.token_end, 1), length) - 1
        rewards[end] += reward
    rewards[-1] += terminal
    return rewards


def own_rewards(length: int, segments: Sequence[Segment], rewards: FloatArray) -> FloatArray:
    """The reward (T,) of the segment that each of T tokens is of, from rewards (S,) of segments."""
    own = np.zeros(length, dtype=np.float32)
    for segment, reward in zip(segments, rewards, strict=True):
        own[segment.token_start : segment.token_end] = reward
    return own


def _hard_or_soft(probs: FloatArray, values: Literal["hard", "soft"]) -> FloatArray:
    """Return p (S, K, C) itself for ``soft``, one-hot of the most likely class for ``hard``."""
    if values == "soft":
        return probs
    return np.eye(len(SegmentClass), dtype=np.float32)[probs.argmax(-1)]
