"""Facts from a chat model: what is asked, what is asked again, what never becomes a label."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from chats import FAILED, STOPPED, Scripted
from hypothesis import given
from hypothesis import strategies as st

from fgaif.chat.messages import ChatRequest, Reply
from fgaif.chat.store import ReplyStore
from fgaif.config import load_config
from fgaif.errors import ConfigError, ServiceError
from fgaif.feedback.extract import ModelFacts, load_facts_prompt
from fgaif.feedback.facts import ExtractedFacts, WholeSegments
from fgaif.feedback.labels import label_segments
from fgaif.feedback.models import FeedbackModels, check_prompts
from fgaif.feedback.parse_reply import facts_schema, read_facts
from fgaif.feedback.plan import Sizes, plan_feedback
from fgaif.kinds import KindConfig
from fgaif.types import DEFAULT_KINDS, UNKNOWN, ImageRef, Prompt, Response, Segment

PIECES = ("A black dog sits here, ", " \n", "and {segment}  2\nsleeps.")
TEXT = "".join(PIECES)
DOG = {"object": ["There is a dog."], "attribute": ["The dog is black."], "relation": []}
NOTHING: dict[str, list[str]] = {"object": [], "attribute": [], "relation": []}
GOOD = json.dumps({"segments": [DOG, NOTHING]})
GOOD_TEXT = "Segment 1\nobject: There is a dog.\nattribute: The dog is black.\nSegment 2\nnone"


def described(*pieces: str) -> tuple[Response, tuple[Segment, ...]]:
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    segments = tuple(
        Segment(index=i, char_start=end - len(piece), char_end=end, token_start=i, token_end=i + 1)
        for i, (piece, end) in enumerate(zip(pieces, ends, strict=True))
    )
    response = Response(
        prompt=Prompt(id="p", image=ImageRef(path="a.png", sha256="a" * 64), text="Describe."),
        sample=0,
        text="".join(pieces),
        token_ids=np.arange(len(pieces)),
        rollout_logprobs=np.zeros(len(pieces), np.float32),
        finish="length",
        policy_version=0,
    )
    return response, segments


RESPONSE, SEGMENTS = described(*PIECES)


def extract(extractor: ModelFacts, segments: tuple[Segment, ...] = SEGMENTS) -> ExtractedFacts:
    return asyncio.run(extractor.extract(RESPONSE, segments))


def labels(found: ExtractedFacts) -> list[list[int]]:
    return label_segments(SEGMENTS, found.facts, {}, DEFAULT_KINDS, found.malformed).tolist()


def test_one_request_holds_all_segments_with_words_in_them() -> None:
    model = Scripted(GOOD)
    found = extract(ModelFacts(model, max_facts=5))
    (request,) = model.asked
    lines = "1. A black dog sits here,\n2. and {segment} 2 sleeps."
    assert f"numbered segments:\n{lines}\nAnswer with JSON" in request.text
    assert request.schema == facts_schema(2, 5, DEFAULT_KINDS)
    assert (request.image, request.attempt, request.subject) == (None, 0, lines)
    assert [(fact.kind, fact.segment) for fact in found.facts] == [("object", 0), ("attribute", 0)]
    assert (found.malformed, found.unreadable, found.failed) == ((), 0, False)


def test_one_request_per_segment_holds_the_whole_response() -> None:
    def answer(request: ChatRequest) -> str:
        entry = DOG if "sleeps" in request.subject else NOTHING
        return json.dumps({"segments": [entry]})

    model = Scripted(by=answer)
    found = extract(ModelFacts(model, per="segment"))
    assert len(model.asked) == 2
    assert "Description: A black dog sits here, and {segment} 2 sleeps.\n" in model.asked[0].text
    assert "Segment: A black dog sits here,\n" in model.asked[0].text
    assert "Segment: and {segment} 2 sleeps.\n" in model.asked[1].text
    assert {fact.segment for fact in found.facts} == {2}


def test_a_response_without_words_is_not_asked_about() -> None:
    model = Scripted()
    for per in ("response", "segment"):
        for segments in ((), SEGMENTS[1:2]):
            assert extract(ModelFacts(model, per=per), segments) == ExtractedFacts(facts=())  # type: ignore[arg-type]
    assert model.asked == []


def test_what_cannot_be_read_is_asked_again_in_the_plain_text_form() -> None:
    model = Scripted("Certainly!", "No.", GOOD_TEXT)
    found = extract(ModelFacts(model, reads=3))
    assert [request.attempt for request in model.asked] == [0, 1, 2]
    assert [request.schema is None for request in model.asked] == [False, True, True]
    versions = [request.prompt_version.split("-")[0] for request in model.asked]
    assert versions == ["facts", "facts_text", "facts_text"]
    assert len(found.facts) == 2
    assert (found.malformed, found.unreadable) == ((), 2)


def test_the_text_form_may_be_used_from_the_start() -> None:
    model = Scripted(GOOD_TEXT)
    extractor = ModelFacts(model, text_form=True)
    assert len(extract(extractor).facts) == 2
    assert model.asked[0].schema is None
    assert extractor.name.startswith("scripted facts_text-")


def test_a_reply_cut_short_may_hide_facts() -> None:
    model = Scripted(Reply(text=GOOD_TEXT, cut=True), GOOD_TEXT)
    assert extract(ModelFacts(model)).unreadable == 1


@pytest.mark.parametrize("per", ["response", "segment"])
def test_unreadable_replies_and_failures_never_become_labels(per: str) -> None:
    unreadable = extract(ModelFacts(Scripted(by=lambda _: "?"), per=per, reads=2))  # type: ignore[arg-type]
    failed = extract(ModelFacts(Scripted(by=lambda _: FAILED), per=per))  # type: ignore[arg-type]
    for found in (unreadable, failed):
        assert found.facts == ()
        # The segment of white space says nothing: its label is NONE, and no reply is needed.
        assert labels(found) == [[UNKNOWN] * 3, [0] * 3, [UNKNOWN] * 3]
    assert (unreadable.failed, failed.failed) == (False, True)
    assert (unreadable.unreadable, failed.unreadable) == (2 if per == "response" else 4, 0)


def test_a_failure_after_an_unreadable_reply_is_a_failure() -> None:
    found = extract(ModelFacts(Scripted("?", FAILED)))
    assert (found.failed, found.unreadable, found.malformed) == (True, 1, (0, 2))


def test_one_failed_segment_leaves_the_others() -> None:
    good = json.dumps({"segments": [DOG]})
    model = Scripted(by=lambda request: FAILED if "sleeps" in request.subject else good)
    found = extract(ModelFacts(model, per="segment"))
    assert {fact.segment for fact in found.facts} == {0}
    assert (found.malformed, found.failed) == ((2,), True)


def test_what_is_left_out_is_counted_over_all_segments() -> None:
    entry = NOTHING | {"object": ["A kite.", "", "A dog."]}
    model = Scripted(by=lambda _: json.dumps({"segments": [entry]}))
    found = extract(ModelFacts(model, per="segment"))
    assert found.dropped == {"foreign": 2, "empty": 2}
    assert found.malformed == (0, 2)


@pytest.mark.parametrize("per", ["response", "segment"])
def test_a_service_that_cannot_be_used_stops_the_work(per: str) -> None:
    with pytest.raises(ServiceError, match="OPENAI_API_KEY"):
        extract(ModelFacts(Scripted(by=lambda _: STOPPED), per=per))  # type: ignore[arg-type]


def test_another_folder_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "facts_text.txt").write_text("Mine: {segments}")
    with pytest.raises(ConfigError, match=r"/facts\.txt"):
        ModelFacts(Scripted(), prompts_dir=tmp_path)
    (tmp_path / "facts.txt").write_text("Mine: {segment}")
    with pytest.raises(ConfigError, match=r"/facts\.txt: holds \{segments\} 0 times"):
        ModelFacts(Scripted(), prompts_dir=tmp_path)
    (tmp_path / "facts.txt").write_text("Mine as JSON: {segments}")
    mine = ModelFacts(Scripted(), prompts_dir=tmp_path)
    assert mine.name != ModelFacts(Scripted()).name
    with pytest.raises(ConfigError, match=r"facts_segment_text\.txt"):
        ModelFacts(Scripted(), prompts_dir=tmp_path, per="segment")


@pytest.mark.parametrize("structured", ["text", "json_schema"])
def test_all_ask_for_the_same_prompts_of_another_folder(tmp_path: Path, structured: str) -> None:
    """The check before sampling, the plan and the extractor; JSON needs a second file."""
    (tmp_path / "facts_text.txt").write_text("Mine: {segments}")
    config = load_config(
        None,
        [
            f"feedback.prompts_dir={tmp_path}", "feedback.extractor=api:mine",
            "feedback.verifier=[api:mine]", "endpoints.mine.model=m",
            "endpoints.mine.base_url=http://127.0.0.1:9/v1",
            f"endpoints.mine.structured={structured}",
        ],
    )  # fmt: skip
    models = FeedbackModels(config, ReplyStore(tmp_path / "replies.sqlite"), None)
    sizes = Sizes(chars=80, segments=2, facts=4)
    for use in (
        lambda: check_prompts(config),
        lambda: plan_feedback(config, 10, sizes),
        models.extractor,
    ):
        if structured == "text":
            use()
        else:
            with pytest.raises(ConfigError, match=r"/facts\.txt"):
                use()


@pytest.mark.parametrize(
    ("name", "count"),
    [("facts", 2), ("facts_text", 2), ("facts_segment", 2), ("facts_segment_text", 2)],
)
def test_the_examples_in_the_prompts_can_be_read(name: str, count: int) -> None:
    """Each example's answer is a good reply to its description; nothing of it is dropped."""
    per = "segment" if "segment" in name else "response"
    text = load_facts_prompt(KindConfig.default(), per, text_form=name.endswith("text")).text  # type: ignore[arg-type]
    examples = text.split("\nExample. ")[1:]
    assert len(examples) == count
    for example in examples:
        question, answer = example.split("\n\n")[0].split("\nAnswer:\n")
        segments = 1 if "segment" in name else question.count("\n")
        found = read_facts(
            answer, asked=range(segments), described=question, max_facts=16, kinds=DEFAULT_KINDS
        )
        assert found is not None, answer
        assert (found.dropped, found.malformed) == ({}, ())


def test_whole_segments_need_no_model() -> None:
    found = asyncio.run(WholeSegments().extract(RESPONSE, SEGMENTS))
    assert len(found.facts) == 6
    assert {fact.text for fact in found.facts} == {
        *("A black dog sits here,", "and {segment} 2 sleeps."),
    }


@given(
    replies=st.lists(st.text(), min_size=6, max_size=6),
    per=st.sampled_from(["response", "segment"]),
)
def test_no_replies_raise_or_give_facts_of_other_segments(replies: list[str], per: str) -> None:
    found = extract(ModelFacts(Scripted(*replies), per=per))  # type: ignore[arg-type]
    assert {fact.segment for fact in found.facts} | set(found.malformed) <= {0, 2}
