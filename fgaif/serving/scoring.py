"""From texts about an image to scored segments, with the code that scores PPO's responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fgaif.data.images import ImageBytes
from fgaif.errors import DataError
from fgaif.feedback.external import given_response
from fgaif.feedback.facts import SceneFacts
from fgaif.feedback.segment import segment_response
from fgaif.serving.errors import image_problem
from fgaif.serving.schema import FactOut, KindScore, SegmentOut, TextResult
from fgaif.types import (
    KINDS,
    Fact,
    FloatArray,
    ImageRef,
    Kind,
    Prompt,
    Response,
    Segment,
    SegmentClass,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreItem:
    """Texts about one image, as the scoring deployment gets them.

    ``min_words`` None means as trained. With ``sampled``, the texts come from a trainer: special
    tokens at their end are taken off, and a text may be empty.
    """

    image: ImageBytes
    prompt: str
    texts: tuple[str, ...]
    min_words: int | None = None
    facts: bool = False
    sampled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A part of the request that cannot be scored: its name, dotted, and why."""

    field: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredText:
    """A text's segments, class probabilities (S, K, C) and facts (None: not told)."""

    text: str
    segments: tuple[Segment, ...]
    probs: FloatArray
    facts: tuple[Fact, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredItem:
    """The texts of an item in order, and the version of the models."""

    texts: tuple[ScoredText, ...]
    version: str


class SegmentScorer(Protocol):
    """Scores segments of responses: reward actors, one or several kinds."""

    max_length: int

    def look(self, image: ImageRef) -> None:
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
    ) -> None:
        self.version = version
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._min_words = min_words
        self._extractor = extractor

    def score(self, items: Sequence[ScoreItem]) -> list[ScoredItem | Refused]:
        """Score all texts of all items together; an item that cannot be read is refused alone."""
        prepared = [self._prepare(item) for item in items]
        flat = [pair for texts in prepared if not isinstance(texts, Refused) for pair in texts]
        probs = iter(self._scorer.probs([text for text, _ in flat], [cut for _, cut in flat]))
        answers: list[ScoredItem | Refused] = []
        for item, texts in zip(items, prepared, strict=True):
            if isinstance(texts, Refused):
                answers.append(texts)
                continue
            scored = tuple(self._scored(item, *pair, next(probs)) for pair in texts)
            answers.append(ScoredItem(texts=scored, version=self.version))
        return answers

    def _prepare(self, item: ScoreItem) -> list[tuple[Response, tuple[Segment, ...]]] | Refused:
        try:
            self._scorer.look(item.image)
        except DataError as error:
            return Refused(field="image", message=image_problem(error))
        pairs = []
        for index, text in enumerate(item.texts):
            field = f"text.{index}" if len(item.texts) > 1 else "text"
            try:
                pair = self._read(item, self._without_specials(text) if item.sampled else text)
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

    def _read(self, item: ScoreItem, text: str) -> tuple[Response, tuple[Segment, ...]]:
        prompt = Prompt(id="request", image=item.image, text=item.prompt)
        response = given_response("the text", prompt, text, self._tokenizer)
        segments = segment_response(response, self._tokenizer, item.min_words or self._min_words)
        return response, segments

    def _without_specials(self, text: str) -> str:
        specials = tuple(token for token in self._tokenizer.all_special_tokens if token)
        while text.endswith(specials):
            text = next(text.removesuffix(token) for token in specials if text.endswith(token))
        return text

    def _scored(
        self,
        item: ScoreItem,
        response: Response,
        segments: tuple[Segment, ...],
        probs: FloatArray,
    ) -> ScoredText:
        facts = None
        if item.facts and self._extractor is not None:
            facts = self._extractor.parse(response, segments).facts
        return ScoredText(text=response.text, segments=segments, probs=probs, facts=facts)


def merge_kinds(parts: Sequence[ScoredItem]) -> ScoredItem:
    """Put together what the scorers of single kinds said of one item, in the order of KINDS."""
    texts = tuple(
        ScoredText(
            text=texts[0].text,
            segments=texts[0].segments,
            probs=np.concatenate([text.probs for text in texts], axis=1),
            facts=texts[0].facts,
        )
        for texts in zip(*(part.texts for part in parts), strict=True)
    )
    return ScoredItem(texts=texts, version=parts[0].version)


def text_result(scored: ScoredText, weights: dict[Kind, float]) -> TextResult:
    """Turn a scored text into the API's answer; see ``fgaif/serving/schema.py`` for the sums."""
    segments = [
        _segment_out(scored, segment, rows, weights)
        for segment, rows in zip(scored.segments, scored.probs, strict=True)
    ]
    rewards = {kind: sum(s.kinds[kind].reward for s in segments) for kind in KINDS}
    return TextResult(
        text=scored.text, segments=segments, rewards=rewards, total=sum(rewards.values())
    )


def _segment_out(
    scored: ScoredText, segment: Segment, probs: FloatArray, weights: dict[Kind, float]
) -> SegmentOut:
    kinds: dict[Kind, KindScore] = {}
    for kind, row in zip(KINDS, probs.tolist(), strict=True):
        reward = weights.get(kind, 0.0) * (row[SegmentClass.OK] - row[SegmentClass.HALLU])
        none, ok, hallu = (row[c] for c in SegmentClass)
        kinds[kind] = KindScore(none=none, ok=ok, hallu=hallu, reward=reward)
    facts = None
    if scored.facts is not None:
        found = (fact for fact in scored.facts if fact.segment == segment.index)
        facts = [FactOut(kind=fact.kind, text=fact.text) for fact in found]
    return SegmentOut(
        index=segment.index,
        start=segment.char_start,
        end=segment.char_end,
        text=scored.text[segment.char_start : segment.char_end],
        kinds=kinds,
        reward=sum(score.reward for score in kinds.values()),
        facts=facts,
    )
