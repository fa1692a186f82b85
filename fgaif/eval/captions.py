"""Caption metrics: from judged segments to the figures of the evaluation, as pure functions.

Who judges is left open: the oracle of the embedded world, the verifier, or the reward models. A
figure whose truth the judge does not know is None, never a guess.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fgaif.eval.benchmarks.chair import chair_scores
from fgaif.kinds import check_kinds
from fgaif.types import (
    UNKNOWN,
    CaptionMetrics,
    IntArray,
    Kind,
    LabeledResponse,
    Response,
    Segment,
    SegmentClass,
    SegmentScores,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedCaption:
    """A labelled caption and what else its judge knows.

    ``malformed`` (S,) says which segments are not English of the world; ``mentions`` are the
    objects that the text names, each time it does; ``objects`` are those that the image shows.
    ``facts_judged`` is False when the labels came without facts.
    """

    labeled: LabeledResponse
    malformed: tuple[bool, ...] | None = None
    mentions: tuple[str, ...] | None = None
    objects: frozenset[str] | None = None
    facts_judged: bool = True

    @property
    def texts(self) -> list[str]:
        """Segment texts (S,), white space at the ends included."""
        return segment_texts(self.labeled.response, self.labeled.segments)


def segment_texts(response: Response, segments: Sequence[Segment]) -> list[str]:
    """Cut a response's text (S,) by the character spans of its segments."""
    return [response.text[segment.char_start : segment.char_end] for segment in segments]


def judged_by_scores(
    response: Response,
    segments: Sequence[Segment],
    scores: SegmentScores,
    kinds: tuple[Kind, ...],
) -> JudgedCaption:
    """Take the reward models' most likely class per segment and kind as the label."""
    labels = scores.probs.argmax(axis=2).astype(np.int64)
    labeled = LabeledResponse(
        response=response,
        kinds=kinds,
        segments=tuple(segments),
        facts=(),
        verdicts={},
        labels=labels,
    )
    return JudgedCaption(labeled=labeled, facts_judged=False)


def caption_metrics(captions: Sequence[JudgedCaption], kinds: Sequence[Kind]) -> CaptionMetrics:
    """Compute all figures over a set of captions, judged for ``kinds`` in this order.

    An empty caption counts as one malformed segment, so that silence is no perfect score.

    Raises:
        DataError: a caption was judged for other kinds.
    """
    for caption in captions:
        labeled = caption.labeled
        check_kinds(f"caption of {labeled.response.id}", labeled.kinds, kinds)
    labels = [caption.labeled.labels for caption in captions]
    merged = np.concatenate(labels) if labels else np.empty((0, len(kinds)), np.int64)
    chair_s, chair_i, recall = _chair(captions)
    return CaptionMetrics(
        kinds={
            kind: _share(merged[:, k] == SegmentClass.HALLU, _judged(merged[:, k]))
            for k, kind in enumerate(kinds)
        },
        any=any_hallucinated(merged),
        chair_s=chair_s,
        chair_i=chair_i,
        recall=recall,
        true_facts=_true_facts(captions),
        length=_mean(token_length(caption.labeled.response) for caption in captions) or 0.0,
        repetition=_mean(flag for c in captions for flag in repeated_segments(c.texts)) or 0.0,
        malformed=_malformed(captions),
    )


def any_hallucinated(labels: IntArray) -> float | None:
    """Share of segments with a hallucination of some kind; labels (S, K).

    The denominator holds segments with facts: one HALLU decides, otherwise OK must be there and
    nothing may be unknown. None when there is no such segment.
    """
    hallu = (labels == SegmentClass.HALLU).any(axis=1)
    fine = (labels == SegmentClass.OK).any(axis=1) & ~(labels == UNKNOWN).any(axis=1)
    return _share(hallu, hallu | fine)


def repeated_segments(texts: Sequence[str]) -> list[bool]:
    """Say for each segment text (S,) whether an earlier one of the caption has the same words.

    Case and punctuation do not count, as in the reward's penalty; blank segments never repeat.
    """
    seen: set[str] = set()
    flags = []
    for text in texts:
        key = " ".join(re.findall(r"\w+", text.lower()))
        flags.append(bool(key) and key in seen)
        seen.add(key)
    return flags


def token_length(response: Response) -> int:
    """Count the sampled tokens, without the EOS that ends a finished response."""
    return len(response.token_ids) - (response.finish == "stop")


def _judged(column: IntArray) -> np.ndarray:
    return (column == SegmentClass.OK) | (column == SegmentClass.HALLU)


def _share(hits: np.ndarray, among: np.ndarray) -> float | None:
    total = int(among.sum())
    return int((hits & among).sum()) / total if total else None


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def _chair(captions: Sequence[JudgedCaption]) -> tuple[float | None, float | None, float | None]:
    known = [
        (c.mentions, c.objects)
        for c in captions
        if c.mentions is not None and c.objects is not None
    ]
    if not known:
        return None, None, None
    scores = chair_scores([mentions for mentions, _ in known], [objects for _, objects in known])
    return scores.chair_s, scores.chair_i, scores.recall


def _true_facts(captions: Sequence[JudgedCaption]) -> float | None:
    return _mean(
        len({text for text, verdict in c.labeled.verdicts.items() if verdict.answer == "yes"})
        for c in captions
        if c.facts_judged
    )


def _malformed(captions: Sequence[JudgedCaption]) -> float | None:
    known = [caption.malformed for caption in captions if caption.malformed is not None]
    return _mean(flag for flags in known for flag in (flags or (True,)))
