"""Verdicts from chat models: probabilities, words, doubt, failure, and panels."""

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
from chats import FAILED, STOPPED, Said, Scripted
from fakes import response
from hypothesis import given
from hypothesis import strategies as st

from fgaif.chat.messages import Reply
from fgaif.data.scenes.questions import verify_question
from fgaif.errors import ConfigError, ServiceError
from fgaif.feedback.labels import label_segments
from fgaif.feedback.store import decode_labeled, encode_labeled
from fgaif.feedback.verify import (
    VerifierPanel,
    YesNoVerifier,
    load_fact_prompt,
    parse_answer,
    yes_probability,
)
from fgaif.types import (
    DEFAULT_KINDS,
    UNKNOWN,
    Answer,
    Fact,
    FactQuery,
    ImageRef,
    LabeledResponse,
    Prompt,
    Segment,
    Verdict,
)

IMAGE = ImageRef(path="a.png", sha256="a" * 64)
QUERY = FactQuery(image=IMAGE, text="There is a {red} moon.")
STATEMENT = load_fact_prompt("statement")


def first(text: str = "", **chances: float) -> Reply:
    """A reply with these probabilities of its first token."""
    tokens = tuple((token, math.log(p) if p else -9999.0) for token, p in chances.items())
    return Reply(text=text, first_token=tokens)


def verify(*said: Said, abstain: float = 0.0, reads: int = 3) -> Verdict:
    verifier = YesNoVerifier(Scripted(*said), STATEMENT, abstain=abstain, reads=reads)
    return asyncio.run(verifier.verify(QUERY))


def test_what_is_asked() -> None:
    model = Scripted("yes")
    asyncio.run(YesNoVerifier(model, STATEMENT).verify(QUERY))
    (request,) = model.asked
    assert request.text == "Statement: There is a {red} moon. Is this right?"
    assert (request.image, request.subject, request.yes_no) == (IMAGE, QUERY.text, True)
    assert request.prompt_version == STATEMENT.version
    assert request.max_tokens <= 8


@pytest.mark.parametrize(
    ("p_yes", "abstain", "answer"),
    [
        (0.9, 0.0, "yes"),
        (0.1, 0.0, "no"),
        (0.55, 0.0, "yes"),
        (0.55, 0.1, "unknown"),
        (0.45, 0.1, "unknown"),
        (0.5, 0.0, "unknown"),  # at one half the model says neither, whatever the band
        (0.0, 0.4, "no"),
    ],
)
def test_verdicts_follow_the_probability_and_abstain_around_one_half(
    p_yes: float, abstain: float, answer: Answer
) -> None:
    verdict = verify(first("no", yes=p_yes, no=1 - p_yes), abstain=abstain)
    assert verdict.answer == answer
    assert verdict.p_yes == pytest.approx(p_yes)
    assert verdict.problem == ""


def test_the_first_tokens_case_and_white_space_do_not_matter() -> None:
    """Yes: 0.3 + 0.1 + 0.1 + 0.1 = 0.6; no: 0.15 + 0.05 = 0.2; so 0.6 / 0.8."""
    tokens = {" Yes": 0.3, "yes": 0.1, "YES": 0.1, "▁yes": 0.1, "No\n": 0.15, "Ġno": 0.05}
    assert yes_probability(first(**tokens, It=0.1, Nobody=0.1).first_token) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "tokens",
    [
        (),
        (("The", -0.1), ("yes", math.log(0.06)), ("no", math.log(0.03))),
        (("yes", math.nan), ("no", math.nan)),
        (("yes", 1e9),),
        (("The", 0.0), ("yes", -9999.0)),
    ],
)
def test_a_ratio_of_next_to_nothing_tells_nothing(tokens: tuple[tuple[str, float], ...]) -> None:
    assert yes_probability(tokens) is None
    verdict = verify(Reply(text="No, it is blue.", first_token=tokens))
    assert (verdict.answer, verdict.p_yes) == ("no", None)


@given(st.lists(st.tuples(st.sampled_from(["yes", "No ", "x"]), st.floats(max_value=0))))
def test_a_probability_is_one_or_nothing(tokens: list[tuple[str, float]]) -> None:
    p_yes = yes_probability(tokens)
    assert p_yes is None or 0 <= p_yes <= 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Yes.", "yes"),
        ("no, it is blue", "no"),
        ("**Yes**", "yes"),
        ("Yes and no", "unknown"),
        ("Nobody knows", "unknown"),
        ("I think yes", "unknown"),
        ("", "unknown"),
    ],
)
def test_written_answers_are_read_strictly(text: str, answer: Answer) -> None:
    assert parse_answer(text) == answer


def test_an_unclear_answer_is_asked_for_again() -> None:
    model = Scripted("Well.", "Yes and no.", "No.")
    verdict = asyncio.run(YesNoVerifier(model, STATEMENT, reads=3).verify(QUERY))
    assert verdict == Verdict(query=QUERY, answer="no")
    assert [request.attempt for request in model.asked] == [0, 1, 2]


def test_doubt_failure_and_a_reply_that_cannot_be_read_are_told_apart() -> None:
    undecided = verify(first(yes=0.5, no=0.5))
    unreadable = verify("Well.", "Perhaps.", reads=2)
    failed = verify("Well.", FAILED)
    assert [v.problem for v in (undecided, unreadable, failed)] == ["", "unreadable", "failed"]
    assert [v.p_yes for v in (undecided, unreadable, failed)] == [0.5, None, None]
    for verdict in (undecided, unreadable, failed):
        fact = Fact(kind="object", text=QUERY.text, segment=0)
        segment = Segment(index=0, char_start=0, char_end=1, token_start=0, token_end=1)
        labels = label_segments([segment], [fact], {QUERY.text: verdict}, DEFAULT_KINDS)
        assert labels.tolist() == [[UNKNOWN, 0, 0]]


def test_a_service_that_cannot_be_used_stops_the_work() -> None:
    with pytest.raises(ServiceError):
        verify(STOPPED)
    with pytest.raises(ServiceError):
        ask(FAILED, STOPPED, "yes")


def ask(*said: Said) -> Verdict:
    """Ask a panel whose members say these once and are not asked again."""
    members = [YesNoVerifier(Scripted(one), STATEMENT, reads=1) for one in said]
    return asyncio.run(VerifierPanel(members).verify(QUERY))


@pytest.mark.parametrize(
    ("said", "answer", "problem"),
    [
        (("yes", "yes", "no"), "yes", ""),
        (("no", "yes", "no"), "no", ""),
        (("yes", "no"), "unknown", ""),  # a tie
        (("yes", "yes", "?"), "yes", ""),  # two of three members are enough
        (("yes", "?"), "unknown", "unreadable"),  # one of two is not
        (("yes", "?", FAILED), "unknown", "failed"),
        (("no", "no", "yes", "yes"), "unknown", ""),
        (("no", FAILED, FAILED), "unknown", "failed"),
        (("yes",), "yes", ""),
    ],
)
def test_more_than_half_of_all_members_decide(
    said: tuple[Said, ...], answer: Answer, problem: str
) -> None:
    verdict = ask(*said)
    assert (verdict.answer, verdict.problem) == (answer, problem)
    assert verdict.votes == tuple(one if one in ("yes", "no") else "unknown" for one in said)


def test_a_panels_probability_is_the_mean_of_all_its_members() -> None:
    verdict = ask(first(yes=0.6, no=0.4), first(yes=0.6, no=0.4), first(yes=0.0, no=1.0))
    assert verdict.answer == "yes"
    assert verdict.p_yes == pytest.approx(0.4)
    assert ask(first(yes=0.6, no=0.4), "yes").p_yes is None


def test_a_panel_is_named_after_its_members() -> None:
    members = [YesNoVerifier(Scripted(), load_fact_prompt(p)) for p in ("statement", "check")]
    panel = VerifierPanel(members)
    assert panel.name == "scripted abstain=0 + scripted abstain=0"
    assert panel.prompt_version == " + ".join(member.prompt_version for member in members)
    with pytest.raises(ConfigError, match=r"feedback\.verifier"):
        VerifierPanel([])


def test_a_verdict_survives_the_store_and_rows_of_before_are_read() -> None:
    verdict = Verdict(query=QUERY, answer="unknown", problem="failed", votes=("yes", "unknown"))
    item = LabeledResponse(
        response=response(Prompt(id="p", image=IMAGE, text="Describe.")),
        kinds=DEFAULT_KINDS,
        segments=(),
        facts=(),
        verdicts={QUERY.text: verdict},
        labels=np.empty((0, 3), np.int64),
    )
    row = encode_labeled(item)
    answer = row["verdicts"][QUERY.text]
    assert decode_labeled(row).verdicts[QUERY.text] == verdict
    for key, value in (("votes", ["perhaps"]), ("problem", "perhaps")):
        with pytest.raises(ValueError, match="perhaps"):
            decode_labeled(row | {"verdicts": {QUERY.text: answer | {key: value}}})
    old = {QUERY.text: {"answer": "unknown", "p_yes": None}}
    before = decode_labeled(row | {"verdicts": old}).verdicts
    assert before == {QUERY.text: Verdict(query=QUERY, answer="unknown")}


def test_shipped_prompts_are_the_worlds_faithscores_and_a_plain_one() -> None:
    assert STATEMENT.fill(fact=QUERY.text) == verify_question(QUERY.text)
    assert load_fact_prompt("faithscore").fill(fact=QUERY.text) == (
        "Statement: There is a {red} moon. Is this statement is right according to the image? "
        "Please answer yes or no."
    )
    assert "exactly one word: yes or no" in load_fact_prompt("check").text
    assert STATEMENT.version.startswith("statement-")


def test_a_prompt_may_be_a_file_and_its_version_changes_with_its_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Is it true? {fact}")
    before = load_fact_prompt(str(path))
    assert before.text == "Is it true? {fact}"
    path.write_text("Is it right? {fact}")
    assert load_fact_prompt(str(path)).version != before.version
    path.write_text("Is it true?")
    with pytest.raises(ConfigError, match=r"mine\.txt: holds \{fact\} 0 times"):
        load_fact_prompt(str(path))
    known = r"feedback\.prompt = 'nope'.*brings check, faithscore, statement$"
    with pytest.raises(ConfigError, match=known):
        load_fact_prompt("nope")
    with pytest.raises(ConfigError, match=r"holds \{fact\} 0 times"):
        load_fact_prompt("facts")  # a prompt of the extractor
