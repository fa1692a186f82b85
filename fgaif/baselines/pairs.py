"""From scored responses to preference pairs and to the best response of each prompt.

What a response is worth comes from its labels or from reward models; two responses to one prompt
make a pair where their scores differ. Ties say nothing and are left out, and counted.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from fgaif.config import RewardShapeConfig
from fgaif.errors import DataError
from fgaif.reward.dense import (
    kind_weights,
    segment_penalties,
    segment_rewards,
    terminal_reward,
    uncentered_values,
)
from fgaif.types import UNKNOWN, FinishReason, LabeledResponse, Prompt, SegmentClass

LabelScore = Literal["hallucinations", "claims", "reward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredText:
    """A response's text with its score, more being better; None where it could not be judged."""

    prompt: Prompt
    text: str
    score: float | None
    finish: FinishReason = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two responses to one prompt; ``chosen`` has the higher score."""

    chosen: ScoredText
    rejected: ScoredText

    @property
    def difference(self) -> float:
        """By how much the chosen one is better."""
        return (self.chosen.score or 0.0) - (self.rejected.score or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """The pairs, the best response of each prompt, and what was left out, as counts.

    ``counts``: ``prompts`` in all; of them ``single`` have fewer than two usable responses, and
    ``ties`` more, whose scores do not differ enough; of the responses ``unjudged`` have no score,
    ``unfinished`` were cut at the length limit, ``repeated`` say what another one says.
    """

    pairs: tuple[Pair, ...]
    best: tuple[ScoredText, ...]
    counts: dict[str, int]

    def summary(self) -> str:
        """One line: pairs, and what was left out."""
        left = {name: count for name, count in self.counts.items() if name != "prompts" and count}
        told = {
            "single": "{} with fewer than two usable responses",
            "ties": "{} with equal scores",
            "unjudged": "{} responses without a score",
            "unfinished": "{} responses cut at the length limit",
            "repeated": "{} repeated responses",
        }
        parts = [told[name].format(count) for name, count in left.items()]
        line = f"{len(self.pairs)} pairs of {self.counts['prompts']} prompts"
        return f"{line}; left out: {', '.join(parts)}" if parts else line


def make_pairs(
    scored: Iterable[ScoredText],
    *,
    per_prompt: int = 1,
    least: float = 0.0,
    draw: int | None = None,
) -> Pairing:
    """Pair the responses of each prompt (same image content and text).

    Args:
        per_prompt: pairs of a prompt at most, those with the largest differences first: one is the
            best response against the worst.
        least: a pair's scores differ by more than this.
        draw: seed that draws the pairs of a prompt instead (RLAIF-V, arXiv 2405.17220: two drawn
            ones of all whose scores differ).
    """
    groups: dict[tuple[str, str], dict[str, ScoredText]] = {}
    counts = Counter(
        dict.fromkeys(("prompts", "single", "ties", "unjudged", "unfinished", "repeated"), 0)
    )
    for item in scored:
        group = groups.setdefault((item.prompt.image.sha256, item.prompt.text), {})
        if item.score is None:
            counts["unjudged"] += 1
        elif item.finish == "length":
            counts["unfinished"] += 1
        elif item.text in group:
            counts["repeated"] += 1
        elif item.text.strip():
            group[item.text] = item
    rng = random.Random(draw)
    pairs: list[Pair] = []
    best: list[ScoredText] = []
    for group in groups.values():
        counts["prompts"] += 1
        items = sorted(group.values(), key=_score, reverse=True)
        best += items[:1]
        found = [Pair(chosen=a, rejected=b) for a, b in combinations(items, 2)]
        differing = [pair for pair in found if pair.difference > least]
        if len(items) < 2:
            counts["single"] += 1
        elif not differing:
            counts["ties"] += 1
        if draw is not None:
            pairs += rng.sample(differing, min(per_prompt, len(differing)))
        else:
            differing.sort(key=lambda pair: pair.difference, reverse=True)
            pairs += differing[:per_prompt]
    return Pairing(pairs=tuple(pairs), best=tuple(best), counts=dict(counts))


def require_pairs(pairing: Pairing, source: str, fix: str) -> None:
    """Refuse a pairing without a pair.

    Raises:
        DataError: says what was left out, and ``fix``.
    """
    if not pairing.pairs:
        raise DataError(f"{source}: no pairs: {pairing.summary()}; {fix}")


def score_labels(
    labeled: Iterable[LabeledResponse], by: LabelScore, shape: RewardShapeConfig
) -> Iterable[ScoredText]:
    """Score labelled responses, one after the other.

    Args:
        by: ``hallucinations``: minus the number of hallucinated (segment, kind), each by the kind's
            weight; ``claims``: RLAIF-V's sum over claims, minus the number of distinct facts judged
            false; ``reward``: the reward of PPO summed over the response, as if the reward models
            gave the labels.
        shape: weights and, for ``reward``, all the rest of the formula.

    Raises:
        DataError: ``claims`` of labels that were made without facts.
    """
    score: Callable[[LabeledResponse], float | None]
    if by == "claims":
        score = _claims
    elif by == "hallucinations":

        def score(item: LabeledResponse) -> float | None:
            return _hallucinations(item, shape)
    else:

        def score(item: LabeledResponse) -> float | None:
            return _reward(item, shape)

    for item in labeled:
        response = item.response
        yield ScoredText(
            prompt=response.prompt, text=response.text, score=score(item), finish=response.finish
        )


def _hallucinations(item: LabeledResponse, shape: RewardShapeConfig) -> float | None:
    if (item.labels == UNKNOWN).any():
        return None
    wrong = (item.labels == SegmentClass.HALLU).sum(axis=0)
    return -float(wrong @ kind_weights(shape, item.kinds))


def _claims(item: LabeledResponse) -> float | None:
    if not item.facts and (item.labels != SegmentClass.NONE).any():
        raise DataError(
            f"response {item.response.id}: its labels came without facts, so there are no claims "
            "to sum over; use --score hallucinations"
        )
    answers = {fact.text: item.verdicts[fact.text].answer for fact in item.facts}
    if "unknown" in answers.values():
        return None
    return -float(sum(answer == "no" for answer in answers.values()))


def _reward(item: LabeledResponse, shape: RewardShapeConfig) -> float | None:
    if (item.labels == UNKNOWN).any():
        return None
    probs = np.eye(len(SegmentClass), dtype=np.float32)[item.labels]
    values = uncentered_values(probs, shape, item.kinds)
    penalties = segment_penalties(item.response.text, item.segments, (), shape.repeat_penalty)
    rewards = segment_rewards(values, kind_weights(shape, item.kinds), penalties)
    return float(rewards.sum()) + terminal_reward(item.response, shape)


def _score(item: ScoredText) -> float:
    assert item.score is not None, "without a score it is in no group"
    return item.score


def mean_words(texts: Sequence[ScoredText]) -> float:
    """Mean number of words; a preference for short texts shows here."""
    return sum(len(item.text.split()) for item in texts) / len(texts) if texts else float("nan")
