"""From a response to its labels, with the embedded world's truth as verifier."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_store import TOKENIZER, respond

from fgaif.data.scenes.facts import oracle
from fgaif.data.scenes.world import scene_at
from fgaif.errors import ServiceError
from fgaif.feedback.annotate import Annotator, feedback_losses
from fgaif.feedback.facts import ExtractedFacts, SceneFacts
from fgaif.feedback.segment import segment_response
from fgaif.types import DEFAULT_KINDS, FactQuery, LabeledResponse, Response, Segment, Verdict

SCENE = scene_at("val", 0)


class Truth:
    """Answers from the scene; fails on texts in ``broken``; keeps what it was asked."""

    name = "truth"
    prompt_version = "v1"

    def __init__(self, broken: Sequence[str] = (), stop: bool = False) -> None:
        self.broken, self.stop = broken, stop
        self.asked: list[str] = []

    async def verify(self, query: FactQuery) -> Verdict:
        self.asked.append(query.text)
        if self.stop:
            raise ServiceError("quota")
        if query.text in self.broken:
            return Verdict(query=query, answer="unknown", problem="failed")
        p_yes = 0.9 if oracle(SCENE, query.text) else 0.1
        return Verdict(query=query, answer="yes" if p_yes > 0.5 else "no", p_yes=p_yes)


class Losing:
    """An extractor with something to report."""

    name = "losing"

    async def extract(self, response: Response, segments: Sequence[Segment]) -> ExtractedFacts:
        found = SceneFacts().parse(response, segments)
        return replace(found, dropped={"foreign": 2, "empty": 1}, unreadable=3, failed=True)


def label(verifier: Truth, extractor: SceneFacts | Losing | None = None) -> LabeledResponse:
    response = respond()
    annotator = Annotator(extractor or SceneFacts(), verifier, 4, DEFAULT_KINDS)
    segments = segment_response(response, TOKENIZER, 4)
    return asyncio.run(annotator.annotate(response, segments))


def test_each_distinct_fact_is_asked_once_and_every_segment_labelled() -> None:
    verifier = Truth()
    labeled = label(verifier)
    assert len(verifier.asked) == len(set(verifier.asked)) == 5
    assert set(labeled.verdicts) == set(verifier.asked)
    assert labeled.labels.shape == (4, 3)
    assert labeled.labels[3].tolist() == [-1, -1, -1]  # "This is odd." is not of this world
    assert labeled.provenance == {
        "extractor": "scenes",
        "verifier": "truth",
        "prompt_version": "v1",
        "min_words": "4",
        "policy_version": "3",
        "image_sha256": "a" * 64,
        "malformed": "3",
    }


def test_a_failed_question_is_unknown_and_counted() -> None:
    labeled = label(Truth(broken=["There is a moon."]))
    assert labeled.labels[0].tolist() == [-1, -1, 0]
    losses = feedback_losses([labeled, label(Truth())])
    unknown = [int((item.labels == -1).any(axis=1).sum()) for item in (labeled, label(Truth()))]
    assert losses["segments with an unknown label"] == sum(unknown)
    assert losses["facts failed"] == 1
    assert losses["responses"] == 2


def test_what_the_extraction_lost_is_counted() -> None:
    labeled = label(Truth(), Losing())
    losses = feedback_losses([labeled, labeled])
    assert losses["facts dropped foreign"] == 4
    assert losses["facts dropped empty"] == 2
    assert losses["replies unreadable"] == 6
    assert losses["responses failed"] == 2


def test_a_model_that_cannot_be_asked_stops_the_work() -> None:
    with pytest.raises(ServiceError, match="quota"):
        label(Truth(stop=True))


def test_labels_agree_with_the_oracle_where_the_verifier_is_right() -> None:
    labeled = label(Truth())
    from fgaif.data.scenes.facts import oracle_classes

    texts = [labeled.response.text[s.char_start : s.char_end] for s in labeled.segments]
    truth = np.array(oracle_classes(SCENE, texts))
    assert np.array_equal(labeled.labels[:3], truth[:3])
