import math

import numpy as np
import pytest

from fgaif.errors import DataError
from fgaif.feedback.facts import SceneFacts
from fgaif.feedback.labels import class_balance, feedback_accuracy, label_segments
from fgaif.types import (
    DEFAULT_KINDS,
    UNKNOWN,
    Answer,
    Fact,
    FactQuery,
    ImageRef,
    Kind,
    LabeledResponse,
    Prompt,
    Response,
    Segment,
    SegmentClass,
    Verdict,
)

NONE, OK, HALLU = SegmentClass
IMAGE = ImageRef(path="a.png", sha256="a" * 64)


def fact(kind: Kind, text: str, segment: int = 0, *requires: str) -> Fact:
    return Fact(kind=kind, text=text, segment=segment, requires=requires)


def said(**answers: Answer) -> dict[str, Verdict]:
    return {
        text: Verdict(query=FactQuery(image=IMAGE, text=text), answer=answer)
        for text, answer in answers.items()
    }


def parts(count: int) -> list[Segment]:
    return [
        Segment(index=i, char_start=i, char_end=i + 1, token_start=i, token_end=i + 1)
        for i in range(count)
    ]


def respond(text: str, image: ImageRef = IMAGE) -> Response:
    return Response(
        prompt=Prompt(id="p", image=image, text="Describe."),
        sample=0,
        text=text,
        token_ids=np.array([1], dtype=np.int64),
        rollout_logprobs=np.zeros(1, dtype=np.float32),
        finish="length",
        policy_version=0,
    )


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], NONE),
        (["yes"], OK),
        (["yes", "yes"], OK),
        (["yes", "no"], HALLU),
        (["yes", "unknown"], UNKNOWN),
        (["no", "unknown"], HALLU),
        (["unknown"], UNKNOWN),
    ],
)
def test_any_no_is_a_hallucination_and_doubt_is_no_label(
    answers: list[Answer], expected: int
) -> None:
    facts = [fact("attribute", f"f{i}") for i in range(len(answers))]
    verdicts = said(**{f"f{i}": answer for i, answer in enumerate(answers)})
    labels = label_segments(parts(1), facts, verdicts, DEFAULT_KINDS)
    assert labels.tolist() == [[NONE, expected, NONE]]
    assert labels.dtype == np.int64


def test_kinds_and_segments_are_judged_apart() -> None:
    facts = [fact("object", "o", 0), fact("relation", "r", 0), fact("object", "p", 2)]
    labels = label_segments(parts(3), facts, said(o="yes", r="no", p="no"), DEFAULT_KINDS)
    assert labels.tolist() == [[OK, NONE, HALLU], [NONE] * 3, [HALLU, NONE, NONE]]


@pytest.mark.parametrize(
    ("moon", "red", "expected"),
    [("yes", "no", HALLU), ("no", "no", NONE), ("no", "yes", NONE), ("unknown", "no", UNKNOWN)],
)
def test_a_fact_about_something_that_is_not_there_is_void(
    moon: Answer, red: Answer, expected: int
) -> None:
    facts = [fact("object", "moon"), fact("attribute", "red", 0, "moon")]
    labels = label_segments(parts(1), facts, said(moon=moon, red=red), DEFAULT_KINDS)
    assert labels[0, 1] == expected


def test_a_malformed_segment_is_unknown_unless_something_in_it_is_wrong() -> None:
    facts = [fact("object", "o", 0), fact("attribute", "a", 0)]
    labels = label_segments(parts(2), facts, said(o="no", a="yes"), DEFAULT_KINDS, malformed=[0])
    assert labels.tolist() == [[HALLU, UNKNOWN, UNKNOWN], [NONE] * 3]


def test_a_fact_that_was_never_verified_is_refused() -> None:
    with pytest.raises(DataError, match="no verdict for 'moon'"):
        label_segments(
            parts(1), [fact("attribute", "red", 0, "moon")], said(red="yes"), DEFAULT_KINDS
        )


def test_no_segments_give_an_empty_table() -> None:
    assert label_segments([], [], {}, DEFAULT_KINDS).shape == (0, 3)


def test_feedback_accuracy_counts_each_fact_of_an_image_once() -> None:
    """Object: right, missed, missed, false alarm -> 1/4. Attribute: only one, undecided."""
    facts = (
        *(fact("object", text) for text in "abcd"),
        fact("attribute", "e"),
        fact("relation", "void"),
    )
    verdicts = said(a="yes", b="yes", c="yes", d="no", e="unknown", void="yes")
    item = LabeledResponse(
        response=respond("x"),
        kinds=DEFAULT_KINDS,
        segments=tuple(parts(1)),
        facts=facts,
        verdicts=verdicts,
        labels=label_segments(parts(1), facts, verdicts, DEFAULT_KINDS),
    )
    truth = {"a": True, "b": False, "c": False, "d": True, "e": True, "void": None}
    result = feedback_accuracy([item, item], lambda _, stated: truth[stated.text], DEFAULT_KINDS)
    objects = result["object"]
    assert (objects.judged, objects.missed, objects.false_alarms) == (4, 2, 1)
    assert objects.accuracy == pytest.approx(0.25)
    assert (result["attribute"].judged, result["attribute"].unknown) == (0, 1)
    assert math.isnan(result["relation"].accuracy)
    assert class_balance([item, item], DEFAULT_KINDS) == {
        "object": {"none": 0, "ok": 0, "hallu": 2, "unknown": 0},
        "attribute": {"none": 0, "ok": 0, "hallu": 0, "unknown": 2},
        "relation": {"none": 0, "ok": 2, "hallu": 0, "unknown": 0},
    }
    assert class_balance([], DEFAULT_KINDS)["object"]["ok"] == 0


def test_scene_facts_go_by_segment_and_name_what_they_presuppose() -> None:
    text = "There is a red moon. Blah blah."
    segments = [
        Segment(index=0, char_start=0, char_end=21, token_start=0, token_end=1),
        Segment(index=1, char_start=21, char_end=31, token_start=1, token_end=2),
    ]
    found = SceneFacts().parse(respond(text), segments)
    assert [(f.kind, f.text, f.segment, f.requires) for f in found.facts] == [
        ("object", "There is a moon.", 0, ()),
        ("attribute", "There is a red moon.", 0, ("There is a moon.",)),
    ]
    assert found.malformed == (1,)
