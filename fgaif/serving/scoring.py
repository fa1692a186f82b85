"""Scores texts about images with PPO's scorers, and makes the API's results of the scores."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fgaif.config import RewardShapeConfig
from fgaif.data.images import ImageBytes
from fgaif.errors import DataError
from fgaif.feedback.external import given_response
from fgaif.feedback.facts import SceneFacts
from fgaif.feedback.segment import segment_response
from fgaif.reward.dense import (
    kind_weights,
    segment_penalties,
    segment_rewards,
    uncentered_values,
)
from fgaif.serving.api_errors import ApiError, image_problem, invalid
from fgaif.serving.schema import FactOut, KindScore, SegmentOut, TextResult
from fgaif.types import (
    Fact,
    FinishReason,
    FloatArray,
    ImageRef,
    Kind,
    Prompt,
    Response,
    Segment,
    SegmentClass,
)

_log = logging.getLogger("fgaif.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreInput:
    """One image and texts about it: what a scoring replica gets for a request.

    ``min_words`` None means as trained. With ``sampled``, the texts come from a trainer: special
    tokens at their end are taken off, and a text may be empty. ``token_ids`` are those of each text
    where the served policy sampled them.
    """

    image: ImageBytes
    prompt: str
    texts: tuple[str, ...]
    min_words: int | None = None
    facts: bool = False
    sampled: bool = False
    token_ids: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleInput:
    """One answer to sample: what a generating replica gets for a request; ``prefix`` are ids that
    it begins with, before ``max_new_tokens`` more."""

    image: ImageBytes
    prompt: str
    temperature: float
    max_new_tokens: int
    seed: int
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A sampled answer with its ids, those of the prefix first."""

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A part of the request that gets no score: its name, dotted, and why.

    ``failed`` says that the models are at fault and not the request.
    """

    field: str
    message: str
    failed: bool = False

    def error(self) -> ApiError:
        """The answer to the request."""
        if self.failed:
            return ApiError(500, "internal", self.message)
        return invalid(self.message, self.field)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredText:
    """A text with its segments and their class probabilities (S, K, C) by kind.

    ``facts`` are None where they were not asked for or cannot be told; ``malformed`` holds indexes
    of segments, as PPO's penalties take them.
    """

    text: str
    segments: tuple[Segment, ...]
    kinds: tuple[Kind, ...]
    probs: FloatArray
    facts: tuple[Fact, ...] | None = None
    malformed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOutput:
    """The scored texts of an input in order, the models' version and the shape of their rewards."""

    texts: tuple[ScoredText, ...]
    version: str
    shape: RewardShapeConfig


class SegmentScorer(Protocol):
    """Scores segments of responses: reward actors, one or several kinds."""

    max_length: int

    def check_image(self, image: ImageRef) -> None:
        """Decode an image and keep its pixels; raises DataError if it is broken."""

    def length(self, response: Response, segments: Sequence[Segment]) -> int:
        """Tokens that the model reads for a response; raises DataError if it cannot."""

    def probs(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[FloatArray]:
        """Class probabilities (S, kinds of the scorer, C) per response."""


class TextScorer:
    """Scores items with one loaded version of the reward models.

    Args:
        tokenizer: the policy's, whose ids the reward models read.
        min_words: splitting that the models were trained with.
        shape: of the rewards.
        kinds: of the scorer, in order.
        extractor: tells the facts of segments; None where that would take a language model.
    """

    def __init__(
        self,
        scorer: SegmentScorer,
        tokenizer: Any,
        *,
        version: str,
        min_words: int,
        extractor: SceneFacts | None,
        shape: RewardShapeConfig,
        kinds: tuple[Kind, ...],
    ) -> None:
        self.version = version
        self._shape = shape
        self._kinds = kinds
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._min_words = min_words
        self._extractor = extractor

    def score(self, items: Sequence[ScoreInput]) -> list[ScoreOutput | Refused]:
        """Score all texts of all items together; an item that cannot be read is refused alone."""
        prepared = [self._prepare(item) for item in items]
        flat = [pair for texts in prepared if not isinstance(texts, Refused) for pair in texts]
        probs = iter(self._scorer.probs([text for text, _ in flat], [cut for _, cut in flat]))
        answers: list[ScoreOutput | Refused] = []
        for item, texts in zip(items, prepared, strict=True):
            if isinstance(texts, Refused):
                answers.append(texts)
                continue
            scored = tuple(self._scored(item, *pair, next(probs)) for pair in texts)
            if all(np.isfinite(text.probs).all() for text in scored):
                answers.append(ScoreOutput(texts=scored, version=self.version, shape=self._shape))
                continue
            told = "the models gave probabilities that are not finite"
            _log.error("version %s: %s", self.version, told)
            answers.append(Refused(field="text", message=told, failed=True))
        return answers

    def _prepare(self, item: ScoreInput) -> list[tuple[Response, tuple[Segment, ...]]] | Refused:
        try:
            self._scorer.check_image(item.image)
        except DataError as error:
            return Refused(field="image", message=image_problem(error))
        pairs = []
        for index in range(len(item.texts)):
            field = f"text.{index}" if len(item.texts) > 1 else "text"
            try:
                pair = self._read(item, index)
                length = self._scorer.length(*pair)
            except DataError as error:
                return Refused(field=field, message=str(error))
            if length > self._scorer.max_length:
                return Refused(
                    field=field,
                    message=f"{length} tokens with image and prompt, the model reads at most "
                    f"{self._scorer.max_length}; shorten it",
                )
            pairs.append(pair)
        return pairs

    def _read(self, item: ScoreInput, index: int) -> tuple[Response, tuple[Segment, ...]]:
        prompt = Prompt(id="request", image=item.image, text=item.prompt)
        text = item.texts[index]
        if item.token_ids is not None:
            response = self._as_sampled(prompt, text, item.token_ids[index])
        else:
            text = self._without_specials(text) if item.sampled else text
            response = given_response("the text", prompt, text, self._tokenizer)
        segments = segment_response(response, self._tokenizer, item.min_words or self._min_words)
        return response, segments

    def _as_sampled(self, prompt: Prompt, text: str, ids: Sequence[int]) -> Response:
        written = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if written.split() != text.split():  # a cut may fall before or after a space
            raise DataError(
                "the served policy has another vocabulary than the one that the reward models read "
                "(policy.model); serve that policy"
            )
        return Response(
            prompt=prompt,
            sample=0,
            text=written,
            token_ids=np.array(ids, dtype=np.int64),
            rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
            finish="stop",
            policy_version=0,
        )

    def _without_specials(self, text: str) -> str:
        specials = tuple(token for token in self._tokenizer.all_special_tokens if token)
        while text.endswith(specials):
            text = next(text.removesuffix(token) for token in specials if text.endswith(token))
        return text

    def _scored(
        self,
        item: ScoreInput,
        response: Response,
        segments: tuple[Segment, ...],
        probs: FloatArray,
    ) -> ScoredText:
        found = self._extractor and self._extractor.parse(response, segments)
        return ScoredText(
            text=response.text,
            segments=segments,
            kinds=self._kinds,
            probs=probs,
            facts=found.facts if found and item.facts else None,
            malformed=found.malformed if found else (),
        )


def merge_kinds(parts: Sequence[ScoreOutput]) -> ScoreOutput:
    """Put together what the scorers of single kinds said of one item, in their order."""
    texts = tuple(
        ScoredText(
            text=texts[0].text,
            segments=texts[0].segments,
            kinds=tuple(kind for text in texts for kind in text.kinds),
            probs=np.concatenate([text.probs for text in texts], axis=1),
            facts=texts[0].facts,
            malformed=texts[0].malformed,
        )
        for texts in zip(*(part.texts for part in parts), strict=True)
    )
    return ScoreOutput(texts=texts, version=parts[0].version, shape=parts[0].shape)


def text_result(scored: ScoredText, shape: RewardShapeConfig) -> TextResult:
    """Turn a scored text into the API's answer, with PPO's rewards before centring."""
    values = uncentered_values(scored.probs, shape, scored.kinds)
    penalties = segment_penalties(
        scored.text, scored.segments, scored.malformed, shape.repeat_penalty
    )
    weights = kind_weights(shape, scored.kinds)
    rewards = segment_rewards(values, weights, penalties)
    weighted = values * weights
    segments = [
        SegmentOut(
            index=segment.index,
            start=segment.char_start,
            end=segment.char_end,
            text=scored.text[segment.char_start : segment.char_end],
            kinds=_kind_scores(scored.kinds, scored.probs[row], weighted[row]),
            reward=float(rewards[row]),
            penalty=float(penalties[row]),
            facts=_facts_of(scored, segment),
        )
        for row, segment in enumerate(scored.segments)
    ]
    return TextResult(
        text=scored.text,
        segments=segments,
        rewards={kind: sum(s.kinds[kind].reward for s in segments) for kind in scored.kinds},
        penalty=sum(s.penalty for s in segments),
        total=sum(s.reward for s in segments),
    )


def _kind_scores(
    kinds: Sequence[Kind], probs: FloatArray, weighted: FloatArray
) -> dict[Kind, KindScore]:
    scores = {}
    for kind, row, reward in zip(kinds, probs.tolist(), weighted.tolist(), strict=True):
        none, ok, hallu = (row[c] for c in SegmentClass)
        scores[kind] = KindScore(none=none, ok=ok, hallu=hallu, reward=reward)
    return scores


def _facts_of(scored: ScoredText, segment: Segment) -> list[FactOut] | None:
    if scored.facts is None:
        return None
    found = (fact for fact in scored.facts if fact.segment == segment.index)
    return [FactOut(kind=fact.kind, text=fact.text) for fact in found]
