"""Replies to facts: what is read, what is left out and counted, what is never guessed at."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgaif.feedback.facts import ExtractedFacts
from fgaif.feedback.labels import label_segments
from fgaif.feedback.parse_reply import MAX_LENGTH, facts_schema, read_facts
from fgaif.types import DEFAULT_KINDS, UNKNOWN, FactQuery, ImageRef, Segment, SegmentClass, Verdict

DESCRIBED = "A black dog is sitting on two benches, and children are watching it. It is a calm day."
NOTHING: dict[str, list[str]] = {"object": [], "attribute": [], "relation": []}
DOG = {"object": ["There is a dog."], "attribute": [" The dog  is black. "], "relation": []}
NONE, OK, HALLU = SegmentClass


def read(text: str, count: int = 2, max_facts: int = 3) -> ExtractedFacts | None:
    return read_facts(
        text, asked=range(count), described=DESCRIBED, max_facts=max_facts, kinds=DEFAULT_KINDS
    )


def written(*entries: object) -> str:
    return json.dumps({"segments": entries})


def objects(*statements: str) -> ExtractedFacts:
    found = read(written(NOTHING | {"object": list(statements)}), 1)
    assert found is not None
    return found


def labels(found: ExtractedFacts, answer: str, count: int = 1) -> list[list[int]]:
    """The labels if the verifier gives every fact the same answer."""
    image = ImageRef(path="a.png", sha256="a" * 64)
    verdicts = {
        fact.text: Verdict(query=FactQuery(image=image, text=fact.text), answer=answer)  # type: ignore[arg-type]
        for fact in found.facts
    }
    segments = [
        Segment(index=i, char_start=i, char_end=i + 1, token_start=i, token_end=i + 1)
        for i in range(count)
    ]
    return label_segments(segments, found.facts, verdicts, DEFAULT_KINDS, found.malformed).tolist()


TEXT_FORM = """Segment 1
none

**Segment 2:**
- Objects: There is a dog.
attribute: The dog is black.
relation: none
"""


@pytest.mark.parametrize(
    "reply",
    [
        written(NOTHING, DOG),
        f"Here it is:\n```json\n{written(NOTHING, DOG)}\n```\nAnything else?",
        TEXT_FORM,
        f"Sure, these are the facts:\n```\n{TEXT_FORM}```",
    ],
)
def test_both_forms_say_the_same(reply: str) -> None:
    found = read(reply)
    assert found is not None
    assert [(fact.kind, fact.text, fact.segment) for fact in found.facts] == [
        ("object", "There is a dog.", 1),
        ("attribute", "The dog is black.", 1),
    ]
    assert (found.malformed, found.dropped) == ((), {})


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I am sorry, I cannot do that.",
        '{"segments": [{"object": ["There is',  # cut off
        written(DOG),  # one entry for two segments
        written(DOG, DOG, DOG),
        written(DOG, {"object": []}),  # kinds are missing
        written(DOG, DOG | {"colour": []}),  # an unknown kind
        written(DOG, DOG | {"relation": "none"}),  # no list
        written(DOG, DOG | {"relation": [3]}),  # no text
        written(DOG, DOG | {"relation": [None]}),
        json.dumps([DOG, DOG]),
        json.dumps({"segments": {"1": DOG, "2": DOG}}),
        written(DOG, DOG).replace('"relation"', '"object"'),  # a key twice
        written(DOG, DOG | {"object": ["A dog \ud800"]}),  # half a character
        "[" * 100_000,
        "Segment 1\nobject: There is a dog.",  # the second is missing
        "Segment 1\nobject: There is a dog.\nSegment 2",  # nothing said of the second
        "Segment 1\nnone\nSegment 2\nnone\nSegment 2\nobject: There is a dog.",
        "object: There is a dog.\nSegment 1\nnone\nSegment 2\nnone",
        "Segment 1\nThere is a dog.\nSegment 2\nnone",  # no kind
        "Segment 1: there is a dog\nnone\nSegment 2\nnone",
        "Segment 1\nnumber: There is one dog.\nSegment 2\nnone",
    ],
)
def test_a_reply_of_another_form_is_unreadable_as_a_whole(reply: str) -> None:
    assert read(reply) is None


def test_statements_without_content_and_repetitions_are_left_out_and_counted() -> None:
    found = objects("", "There is a dog.", "there is a  Dog")
    assert [fact.text for fact in found.facts] == ["There is a dog."]
    assert found.dropped == {"empty": 1, "duplicate": 1}
    assert found.malformed == ()
    assert labels(found, "yes") == [[OK, NONE, NONE]]
    assert objects(" ", "None.").dropped == {"empty": 2}


def test_the_same_statement_counts_for_each_segment_and_kind() -> None:
    found = read(written(DOG, DOG))
    assert found is not None
    assert [fact.segment for fact in found.facts] == [0, 0, 1, 1]
    assert found.dropped == {}


@pytest.mark.parametrize(
    "leaked",
    [
        "There is a kite.",
        "There are two fishermen.",  # "two" is in the response, but means nothing alone
        "It is there.",
    ],
)
def test_a_statement_foreign_to_the_response_spoils_its_segment(leaked: str) -> None:
    found = objects("There is a dog.", leaked)
    assert [fact.text for fact in found.facts] == ["There is a dog."]
    assert found.dropped == {"foreign": 1}
    assert labels(found, "yes") == [[UNKNOWN] * 3]
    assert labels(found, "no") == [[HALLU, UNKNOWN, UNKNOWN]]


@pytest.mark.parametrize(
    "statement",
    [
        "There is a child.",
        "There is a bench.",
        "Someone watches.",
        "Somebody sits.",
        "The days are long.",
        "CALM",
    ],
)
def test_inflected_words_are_not_foreign(statement: str) -> None:
    assert objects(statement).dropped == {}


def test_a_segment_number_that_there_is_not_brings_no_fact() -> None:
    found = read(f"{TEXT_FORM}\nSegment 3\nobject: There is a dog.\nobject: There is a bench.")
    assert found is not None
    assert {fact.segment for fact in found.facts} == {1}
    assert (found.dropped, found.malformed) == ({"foreign": 2}, ())


def test_a_list_that_is_too_long_is_cut_and_its_segment_never_clean() -> None:
    """Four and five statements where three are allowed: 1 + 2 are left out."""
    long = {
        "object": [f"Dog {i}." for i in range(4)],
        "relation": [f"Bench {i}." for i in range(5)],
    }
    found = read(written(NOTHING, NOTHING | long))
    assert found is not None
    assert [fact.text for fact in found.facts] == [
        *("Dog 0.", "Dog 1.", "Dog 2."),
        *("Bench 0.", "Bench 1.", "Bench 2."),
    ]
    assert (found.dropped, found.malformed) == ({"excess": 3}, (1,))
    assert labels(found, "yes", 2) == [[NONE] * 3, [UNKNOWN] * 3]
    assert labels(found, "no", 2) == [[NONE] * 3, [HALLU, UNKNOWN, HALLU]]


def test_a_description_is_no_atomic_fact() -> None:
    fits = "dog ".ljust(MAX_LENGTH, "x")
    found = objects(fits, f"{fits}x")
    assert [fact.text for fact in found.facts] == [fits]
    assert (found.dropped, found.malformed) == ({"long": 1}, (0,))


def test_facts_carry_the_indexes_that_were_asked_about() -> None:
    found = read_facts(
        written(NOTHING, DOG), asked=(4, 7), described=DESCRIBED, max_facts=3, kinds=DEFAULT_KINDS
    )
    assert found is not None
    assert {fact.segment for fact in found.facts} == {7}


def test_the_schema_leaves_room_to_say_too_much_and_sets_no_length() -> None:
    schema = facts_schema(2, 3, DEFAULT_KINDS)
    entries = schema["properties"]["segments"]
    assert (entries["minItems"], entries["maxItems"]) == (2, 2)
    assert list(entries["items"]["properties"]) == list(DEFAULT_KINDS)
    assert entries["items"]["properties"]["object"]["maxItems"] == 4
    assert "Length" not in json.dumps(schema)


_statements = st.lists(st.one_of(st.text(), st.just("A dog."), st.integers(), st.none()))
_entries = st.dictionaries(st.sampled_from([*DEFAULT_KINDS, "x"]), _statements)
_lines = st.one_of(
    st.integers(0, 4).map("Segment {}".format),
    st.sampled_from(["object: A dog.", "relation: none", "none", "", "```", "Well."]),
    st.text(),
)
_replies = st.one_of(
    st.text(),
    st.lists(_entries, max_size=3).map(lambda entries: written(*entries)),
    st.recursive(
        st.none() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["segments", *DEFAULT_KINDS]), inner)
        ),
    ).map(json.dumps),
    st.lists(_lines).map("\n".join),
)


@given(reply=_replies, count=st.integers(1, 3), max_facts=st.integers(1, 3))
def test_no_reply_raises_or_speaks_of_other_segments(
    reply: str, count: int, max_facts: int
) -> None:
    asked = range(10, 10 + count)
    found = read_facts(
        reply, asked=asked, described="A dog.", max_facts=max_facts, kinds=DEFAULT_KINDS
    )
    if found is not None:
        assert {fact.segment for fact in found.facts} | set(found.malformed) <= set(asked)
        assert all(fact.text.strip() and len(fact.text) <= MAX_LENGTH for fact in found.facts)
        assert all(fact.text.encode() for fact in found.facts)
        assert len(found.facts) <= max_facts * count * len(DEFAULT_KINDS)


@pytest.mark.parametrize(
    "nothing",
    ["none", "None.", "N/A", "n/a", "NA", "nil", "null", "nothing", "No facts.", "Not applicable",
     "No relation.", "no attributes mentioned", "There are no relations", "None mentioned.",
     "No attributes are mentioned.", "The segment states no facts.", "none are given", "Not found"],
)  # fmt: skip
def test_words_for_nothing_are_no_facts(nothing: str) -> None:
    said = {"object": ["There is a dog."], "attribute": [nothing], "relation": []}
    found = read_facts(
        json.dumps({"segments": [said]}),
        asked=[0],
        described="A dog.",
        max_facts=8,
        kinds=DEFAULT_KINDS,
    )
    assert found is not None
    assert [fact.text for fact in found.facts] == ["There is a dog."]
    assert found.malformed == ()
    assert found.dropped == {"empty": 1}


@pytest.mark.parametrize(
    ("described", "fact"),
    [
        ("A man stands.", "There is a person."),
        ("Two women talk.", "There are people."),
        ("A dog sleeps.", "There is an animal."),
        ("Buses wait.", "There are vehicles."),
    ],
)
def test_a_word_for_the_group_is_not_foreign(described: str, fact: str) -> None:
    said = {"object": [fact, "There is a unicorn."], "attribute": [], "relation": []}
    found = read_facts(
        json.dumps({"segments": [said]}),
        asked=[0],
        described=described,
        max_facts=8,
        kinds=DEFAULT_KINDS,
    )
    assert found is not None
    assert [kept.text for kept in found.facts] == [fact]
    assert found.dropped == {"foreign": 1}
