"""Caption metrics: from judged segments to the figures of the evaluation, as pure functions.

Who judges is left open: the oracle of the embedded world, the verifier, or the reward models. A
figure whose truth the judge does not know is None, never a guess.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fgaif.eval.benchmarks.chair import caption_stats
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


Count = tuple[float, float]
"""Numerator and denominator of a figure: over captions both are summed, then divided."""


def caption_counts(caption: JudgedCaption) -> dict[str, Count]:
    """What one caption adds to each figure, by the figure's name; unknown figures are left out.

    An empty caption counts as one malformed segment, so that silence is no perfect score.
    """
    labeled = caption.labeled
    labels, repeated = labeled.labels, repeated_segments(caption.texts)
    counts: dict[str, Count] = {
        kind: _hits(labels[:, k] == SegmentClass.HALLU, _judged(labels[:, k]))
        for k, kind in enumerate(labeled.kinds)
    }
    counts["any"] = _any_counts(labels)
    if caption.mentions is not None and caption.objects is not None:
        sums = np.array(caption_stats(caption.mentions, caption.objects))
        _, wrong, named, false, shown, covered, _ = sums.tolist()
        counts |= {"chair_s": (wrong, 1), "chair_i": (false, named), "recall": (covered, shown)}
    if caption.facts_judged:
        true = {text for text, verdict in labeled.verdicts.items() if verdict.answer == "yes"}
        counts["true_facts"] = (len(true), 1)
        if {"object", "attribute"} <= set(labeled.kinds):
            stated = {
                kind: len({fact.text for fact in labeled.facts if fact.kind == kind})
                for kind in ("object", "attribute")
            }
            counts["specificity"] = (stated["attribute"], stated["object"])
    counts["length"] = (token_length(labeled.response), 1)
    counts["repetition"] = (sum(repeated), len(repeated))
    if caption.malformed is not None:
        flags = caption.malformed or (True,)
        counts["malformed"] = (sum(flags), len(flags))
    return {name: (float(above), float(below)) for name, (above, below) in counts.items()}


def caption_metrics(captions: Sequence[JudgedCaption], kinds: Sequence[Kind]) -> CaptionMetrics:
    """Compute all figures over a set of captions, judged for ``kinds`` in this order.

    Raises:
        DataError: a caption was judged for other kinds.
    """
    for caption in captions:
        labeled = caption.labeled
        check_kinds(f"caption of {labeled.response.id}", labeled.kinds, kinds)
    sums: dict[str, Count] = {}
    for caption in captions:
        for name, (above, below) in caption_counts(caption).items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + above, old[1] + below)
    values = {name: above / below for name, (above, below) in sums.items() if below}
    return CaptionMetrics(
        kinds={kind: values.get(kind) for kind in kinds},
        any=values.get("any"),
        chair_s=values.get("chair_s"),
        chair_i=values.get("chair_i"),
        recall=values.get("recall"),
        true_facts=values.get("true_facts"),
        length=values.get("length", 0.0),
        repetition=values.get("repetition", 0.0),
        malformed=values.get("malformed"),
        specificity=values.get("specificity"),
    )


def any_hallucinated(labels: IntArray) -> float | None:
    """Share of segments with a hallucination of some kind; labels (S, K).

    The denominator holds segments with facts: one HALLU decides, otherwise OK must be there and
    nothing may be unknown. None when there is no such segment.
    """
    above, below = _any_counts(labels)
    return above / below if below else None


def _any_counts(labels: IntArray) -> Count:
    hallu = (labels == SegmentClass.HALLU).any(axis=1)
    fine = (labels == SegmentClass.OK).any(axis=1) & ~(labels == UNKNOWN).any(axis=1)
    return _hits(hallu, hallu | fine)


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


def _hits(hits: np.ndarray, among: np.ndarray) -> Count:
    return int((hits & among).sum()), int(among.sum())
