"""Facts from a model with JSON output: what is asked, what is read, what never becomes a label."""

import json
from collections.abc import Sequence

import pytest
from fakes import prompts, response, two_segments

from fgaif.feedback.model_facts import ModelFacts, TextRequest, facts_schema, read_facts

DOG = {"object": ["There is a dog."], "attribute": [" There is a  black dog. ", ""], "relation": []}
NOTHING: dict[str, list[str]] = {"object": [], "attribute": [], "relation": []}


def test_facts_carry_kind_and_segment_and_are_tidied() -> None:
    found = read_facts(json.dumps({"segments": [NOTHING, DOG]}), 2)
    assert [(fact.kind, fact.text, fact.segment) for fact in found.facts] == [
        ("object", "There is a dog.", 1),
        ("attribute", "There is a black dog.", 1),
    ]
    assert found.malformed == ()


@pytest.mark.parametrize(
    "answer",
    [
        "",
        '{"segments": [{"object": ["There is',  # cut by max_tokens
        json.dumps({"segments": [DOG]}),  # one entry for two segments
        json.dumps({"segments": [DOG, {"object": []}]}),  # a kind is missing
        json.dumps({"segments": [DOG, DOG | {"relation": "none"}]}),  # no list
        json.dumps({"segments": [DOG, DOG | {"relation": [3]}]}),  # no text
        json.dumps([DOG, DOG]),
    ],
)
def test_an_answer_that_cannot_be_read_makes_every_segment_malformed(answer: str) -> None:
    found = read_facts(answer, 2)
    assert found.facts == ()
    assert found.malformed == (0, 1)


def test_one_request_per_response_with_all_segments_as_context() -> None:
    asked: list[TextRequest] = []

    def model(requests: Sequence[TextRequest]) -> list[str]:
        asked.extend(requests)
        return [json.dumps({"segments": [DOG, NOTHING]}) for _ in requests]

    items = [response(prompt) for prompt in prompts(2)]
    segments = [two_segments(items[0]), ()]
    found = ModelFacts(model, model_id="m").extract(items, segments)
    assert len(asked) == 1  # the second response has no segment
    assert "1. a b,\n2. c d" in asked[0].prompt
    assert asked[0].schema == facts_schema(2)
    assert [len(facts.facts) for facts in found] == [2, 0]
    assert found[1].malformed == ()
