"""From verdicts to labels, and from the truth to how good the feedback was."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fgaif.errors import DataError
from fgaif.types import (
    UNKNOWN,
    Answer,
    Fact,
    IntArray,
    Kind,
    LabeledResponse,
    Response,
    Segment,
    SegmentClass,
    Verdict,
)

Oracle = Callable[[Response, Fact], bool | None]
"""Says whether a fact holds in the response's image; None if it is void or cannot be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindAccuracy:
    """How the verdicts of one kind compare with the truth; facts are counted once per image.

    ``judged`` facts have a yes/no verdict and a known truth; ``missed`` of them were false but
    answered yes, ``false_alarms`` true but answered no; ``unknown`` have a known truth but no
    yes/no verdict.
    """

    judged: int
    missed: int
    false_alarms: int
    unknown: int

    @property
    def accuracy(self) -> float:
        """Share of judged facts with the right verdict; NaN if none was judged."""
        return 1 - (self.missed + self.false_alarms) / self.judged if self.judged else float("nan")


def label_segments(
    segments: Sequence[Segment],
    facts: Sequence[Fact],
    verdicts: Mapping[str, Verdict],
    kinds: Sequence[Kind],
    malformed: Collection[int] = (),
) -> IntArray:
    """Return labels (S, K): ``SegmentClass``, or ``UNKNOWN`` where it cannot be told.

    A fact that presupposes a false one is void. Of the others of a segment and kind: any "no"
    makes HALLU; else anything unknown (a verdict, a presupposition, or a malformed segment, which
    may say more than was understood) makes UNKNOWN; else any "yes" makes OK; else NONE.

    Args:
        verdicts: by fact text, for every fact and everything that a fact requires.

    Raises:
        DataError: a verdict is missing, or a fact is of none of the kinds.
    """
    answers: dict[tuple[int, Kind], set[Answer]] = {
        (index, kind): {"unknown"} for index in malformed for kind in kinds
    }
    for fact in facts:
        if fact.kind not in kinds:
            raise DataError(
                f"fact {fact.text!r} of segment {fact.segment}: its kind {fact.kind!r} is none of "
                f"kinds = {list(kinds)}"
            )
        answer = _answer(fact, verdicts)
        if answer is not None:
            answers.setdefault((fact.segment, fact.kind), set()).add(answer)
    rows = [[_label(answers.get((s.index, kind), set())) for kind in kinds] for s in segments]
    return np.array(rows, dtype=np.int64).reshape(len(segments), len(kinds))


def distinct_facts(
    labeled: Iterable[LabeledResponse],
) -> Iterator[tuple[LabeledResponse, Fact]]:
    """Yield each fact of an image where it is first stated: it was judged once."""
    seen: set[tuple[str, str]] = set()
    for item in labeled:
        sha256 = item.response.prompt.image.sha256
        for fact in item.facts:
            if (sha256, fact.text) not in seen:
                seen.add((sha256, fact.text))
                yield item, fact


def feedback_accuracy(
    labeled: Iterable[LabeledResponse], oracle: Oracle, kinds: Sequence[Kind]
) -> dict[Kind, KindAccuracy]:
    """Compare verdicts with the truth, per kind, over the facts that the oracle can judge."""
    counts: Counter[tuple[Kind, str]] = Counter()
    for item, fact in distinct_facts(labeled):
        truth = oracle(item.response, fact)
        if truth is not None:
            counts[fact.kind, _outcome(truth, item.verdicts[fact.text].answer)] += 1
    return {
        kind: KindAccuracy(
            judged=sum(counts[kind, outcome] for outcome in ("right", "missed", "false alarm")),
            missed=counts[kind, "missed"],
            false_alarms=counts[kind, "false alarm"],
            unknown=counts[kind, "unknown"],
        )
        for kind in kinds
    }


def class_balance(
    labeled: Iterable[LabeledResponse], kinds: Sequence[Kind]
) -> dict[Kind, dict[str, int]]:
    """Count the labels of each kind: ``none``, ``ok``, ``hallu``, ``unknown``."""
    names = {**{int(c): c.name.lower() for c in SegmentClass}, UNKNOWN: "unknown"}
    counts = {kind: dict.fromkeys(names.values(), 0) for kind in kinds}
    for item in labeled:
        for kind in kinds:
            for code in item.of_kind(kind).tolist():
                counts[kind][names[code]] += 1
    return counts


def _answer(fact: Fact, verdicts: Mapping[str, Verdict]) -> Answer | None:
    """Return the verdict of a fact in the light of what it presupposes; None if it is void."""
    try:
        required = {verdicts[text].answer for text in fact.requires}
        answer = verdicts[fact.text].answer
    except KeyError as error:
        raise DataError(f"no verdict for {error}; verify it before labelling") from error
    if "no" in required:
        return None
    return "unknown" if "unknown" in required else answer


def _label(answers: set[Answer]) -> int:
    if "no" in answers:
        return SegmentClass.HALLU
    if "unknown" in answers:
        return UNKNOWN
    return SegmentClass.OK if "yes" in answers else SegmentClass.NONE


def _outcome(truth: bool, answer: Answer) -> str:
    if answer == "unknown":
        return "unknown"
    if truth == (answer == "yes"):
        return "right"
    return "false alarm" if truth else "missed"
