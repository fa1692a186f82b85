"""Facts against a reference: precision, recall, what fails left out and counted."""

import asyncio
import json
from pathlib import Path

import pytest
from chats import FAILED, Scripted

from fgaif.chat.messages import ChatRequest
from fgaif.errors import DataError
from fgaif.eval.answer_facts import AnsweredImage
from fgaif.eval.benchmarks.dcscore import FactMatcher, read_references, read_stated
from fgaif.eval.scored import Scored
from fgaif.feedback.extract import ModelFacts
from fgaif.feedback.verify import YesNoVerifier, load_fact_prompt
from fgaif.types import ImageRef

REF = ImageRef(path="1.jpg", sha256="0" * 64)
ANSWER = "A black dog and a cat sit on a sofa."
REFERENCE = "A dog and a lamp are in a room."
FACTS = {
    ANSWER: ["There is a dog.", "There is a cat.", "There is a sofa."],
    REFERENCE: ["There is a dog.", "There is a lamp."],
}


def score(
    matches: Scripted, answer: str = ANSWER, verdicts: str = "no yes", facts: str = ""
) -> Scored:
    """One answer; ``verdicts`` are on what the reference does not bear out: cat and sofa."""

    def extract(request: ChatRequest) -> str:
        found = next((v for text, v in FACTS.items() if text in request.text), [])
        return facts or json.dumps(
            {"segments": [{"object": found, "attribute": [], "relation": []}]}
        )

    said = dict(zip(("There is a cat.", "There is a sofa."), verdicts.split(), strict=True))
    verifier = YesNoVerifier(
        Scripted(by=lambda request: said[request.subject]), load_fact_prompt("statement")
    )
    matcher = FactMatcher(ModelFacts(Scripted(by=extract)), verifier, matches)
    item = AnsweredImage(id="a", image="1.jpg", ref=REF, answer=answer)
    return asyncio.run(matcher.score([item], {"1.jpg": REFERENCE, "2.jpg": "x"}))


def test_facts_count_that_the_reference_or_the_image_bears_out() -> None:
    """Of three facts the dog is in the reference, the sofa in the image, the cat in neither; of
    the reference's two facts the answer states one."""
    judge = Scripted('{"stated": [1]}', '{"stated": [1]}')
    scored = score(judge)
    assert scored.metrics() == pytest.approx(
        {
            "precision": 2 / 3,
            "recall": 1 / 2,
            "f1": 4 / 7,
            "facts": 3,
            "true_facts": 2,
            "length": 10,
        }
    )
    assert "1. There is a dog.\n2. There is a cat." in judge.asked[0].text
    assert REFERENCE in judge.asked[0].text
    assert ANSWER in judge.asked[1].text
    assert scored.items[0]["facts"] == {
        "There is a dog.": True, "There is a cat.": False, "There is a sofa.": True,
    }  # fmt: skip


def test_an_unknown_verdict_counts_for_nothing() -> None:
    scored = score(Scripted('{"stated": [1]}', '{"stated": []}'), verdicts="perhaps yes")
    assert scored.metrics()["precision"] == 1
    assert (scored.metrics()["recall"], scored.metrics()["facts"]) == (0, 2)
    assert scored.counts["facts_unknown"] == 1


def test_an_empty_answer_is_silent_and_not_wrong() -> None:
    scored = score(Scripted(), answer="")
    metrics = scored.metrics()
    assert (metrics["recall"], metrics["facts"]) == (0, 0)
    assert metrics["precision"] != metrics["precision"]


@pytest.mark.parametrize(
    ("matches", "facts", "reason"),
    [(Scripted(FAILED, FAILED), "", "unmatched"), (Scripted(), "no list", "unextracted")],
)
def test_what_fails_is_left_out(matches: Scripted, facts: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"no answer of 1 could be scored.*'answers_{reason}': 1"):
        score(matches, facts=facts)


def test_replies_and_references_are_read(tmp_path: Path) -> None:
    assert read_stated('So: {"stated": [2, 1]}', 2) == {1, 2}
    assert read_stated('{"stated": []}', 0) == frozenset()
    for bad in ('{"stated": [3]}', '{"stated": ["1"]}', "[1]", "none", '{"x": 1}'):
        assert read_stated(bad, 2) is None
    rows = [{"image": "a/1.jpg", "caption": "One."}, {"image_id": "1.jpg", "reference": "Two."}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_references(tmp_path / "r.jsonl") == {"1.jpg": "One.\nTwo."}
