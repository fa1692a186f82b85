"""FaithScore: three stages on scripted models, scores by hand, failures left out and counted."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chats import FAILED, STOPPED, Scripted
from PIL import Image

from fgaif.chat.messages import ChatRequest
from fgaif.errors import DataError, ServiceError
from fgaif.eval.answer_facts import AnsweredImage, read_lines
from fgaif.eval.benchmarks.faithscore import FaithScorer
from fgaif.eval.scored import Scored
from fgaif.eval.subsentences import entity, faithful, read_labels
from fgaif.feedback.extract import ModelFacts
from fgaif.feedback.facts import SceneFacts
from fgaif.feedback.verify import YesNoVerifier, load_fact_prompt
from fgaif.types import Answer, Fact, ImageRef, Kind

REF = ImageRef(path="1.jpg", sha256="0" * 64)
ANSWER = "A black dog sits on a sofa. Two cats sleep on the mat. It is a calm and quiet evening."
FACTS: list[dict[str, list[str]]] = [
    {
        "object": ["There is a dog.", "There is a sofa."],
        "attribute": ["There is a black dog."],
        "relation": ["The dog sits on the sofa."],
    },
    {
        "object": ["There are cats.", "There is a mat."],
        "attribute": ["There are two cats."],
        "relation": ["The cats sleep on the mat."],
    },
]
WRONG = ("There are two cats.", "The cats sleep on the mat.")
LABELS = json.dumps({"labels": ["descriptive", "descriptive", "analytical"]})


def answered(text: str = ANSWER, identity: str = "a", image: str = "1.jpg") -> AnsweredImage:
    return AnsweredImage(id=identity, image=image, ref=REF, answer=text)


def scorer(
    extraction: Scripted,
    wrong: Sequence[str] = WRONG,
    unsure: Sequence[str] = (),
    labeler: Scripted | None = None,
) -> FaithScorer:
    """A scorer whose verifier says no to ``wrong`` and nothing readable to ``unsure``."""

    def verdict(request: ChatRequest) -> str:
        if request.subject in unsure:
            return "Perhaps."
        return "no" if request.subject in wrong else "yes"

    verifier = YesNoVerifier(Scripted(by=verdict), load_fact_prompt("faithscore"))
    return FaithScorer(ModelFacts(extraction), verifier, labeler)


def facts_of(request: ChatRequest) -> str:
    """What the extractor's model says: the facts of the sub-sentences that it was shown."""
    shown = request.subject.split("\n")
    known = {"dog": FACTS[0], "cats": FACTS[1]}
    nothing: dict[str, list[str]] = {"object": [], "attribute": [], "relation": []}
    entries = [
        next((entry for word, entry in known.items() if word in line), nothing) for line in shown
    ]
    return json.dumps({"segments": entries})


def run(faith: FaithScorer, *answers: AnsweredImage) -> Scored:
    return asyncio.run(faith.score(answers or [answered()]))


def test_scores_by_hand() -> None:
    """Answer a: 6 of 8 facts hold; the dog's sub-sentence is faithful, the cats' is not.

    Answer b has one descriptive sub-sentence with 4 facts that hold, answer c no fact: 0, and no
    descriptive sub-sentence: 1.
    """
    extraction = Scripted(by=facts_of)
    labeler = Scripted(LABELS, '{"labels": ["descriptive"]}', '{"labels": ["analytical"]}')
    scored = run(
        scorer(extraction, labeler=labeler),
        answered(),
        answered("A black dog sits on a sofa.", "b", "2.jpg"),
        answered("How nice it is!", "c", "2.jpg"),
    )
    metrics = scored.metrics()
    assert metrics["faithscore"] == pytest.approx((6 / 8 + 1 + 0) / 3)
    assert metrics["faithscore_s"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert metrics["facts"] == pytest.approx(12 / 3)
    assert [metrics[kind] for kind in ("object", "attribute", "relation")] == [
        1.0,
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),
    ]
    assert scored.units == ("1.jpg", "2.jpg", "2.jpg")
    assert scored.badness is not None
    assert scored.badness.tolist() == [0.25, 0.0, 1.0]
    assert scored.counts == {
        "answers_without_facts": 1,
        "facts_unknown": 0,
        "segments_malformed": 0,
        "answers_unlabelled": 0,
        "answers_unextracted": 0,
        "answers_unverified": 0,
    }
    assert "evening" not in extraction.asked[0].text  # analytical: no facts are asked for
    assert scored.items[0]["descriptive"] == [
        {"text": "A black dog sits on a sofa.", "faithful": True},
        {"text": "Two cats sleep on the mat.", "faithful": False},
    ]
    assert "faithscore_stage1-" in scored.provenance["stage1"]
    assert scored.provenance["prompt"].startswith("faithscore-")


def test_without_the_first_stage_every_sub_sentence_is_descriptive() -> None:
    """Three sub-sentences, of which the cats' is unfaithful."""
    extraction = Scripted(by=facts_of)
    scored = run(scorer(extraction))
    assert scored.metrics()["faithscore_s"] == pytest.approx(2 / 3)
    assert scored.provenance["stage1"] == "none"
    assert "evening" in extraction.asked[0].text


def test_unknown_verdicts_are_left_out_and_counted() -> None:
    """Of 8 facts one is unknown and one is false."""
    scored = run(scorer(Scripted(by=facts_of), wrong=WRONG[:1], unsure=WRONG[1:]))
    assert scored.metrics()["faithscore"] == pytest.approx(6 / 7)
    assert scored.metrics()["facts"] == 7
    assert scored.counts["facts_unknown"] == 1


def test_a_fact_said_twice_is_asked_and_counted_once() -> None:
    twice = json.dumps({"segments": [FACTS[0], FACTS[0]]})
    scored = run(
        scorer(Scripted(twice), wrong=["There is a sofa."]),
        answered("A black dog sits on a sofa. The dog is black."),
    )
    assert scored.metrics()["faithscore"] == pytest.approx(3 / 4)


def test_answers_that_a_stage_failed_on_are_left_out_and_counted() -> None:
    """Stage 1 never readable; stage 2 without a reply; stage 3 unknown throughout; one is fine."""
    said = {
        "green": "I cannot tell.",
        "red": '{"labels": ["descriptive"]}',
        "blue": '{"labels": ["descriptive"]}',
        "dog": '```json\n{"labels": ["descriptive"]}\n```',
    }
    labeler = Scripted(by=lambda r: next(reply for w, reply in said.items() if w in r.subject))

    def extraction(request: ChatRequest) -> str | Exception:
        if "red" in request.subject:
            return FAILED
        if "blue" in request.subject:
            fact = {"object": ["There is a blue cup."], "attribute": [], "relation": []}
            return json.dumps({"segments": [fact]})
        return facts_of(request)

    faith = scorer(
        Scripted(by=extraction), wrong=(), unsure=["There is a blue cup."], labeler=labeler
    )
    words = ("green", "red", "blue", "dog")
    scored = run(faith, *(answered(f"A {word} it is.", word) for word in words))
    assert scored.ids == ("dog",)
    assert scored.metrics()["faithscore"] == 1.0
    assert scored.counts["answers_unlabelled"] == 1
    assert scored.counts["answers_unextracted"] == 1
    assert scored.counts["answers_unverified"] == 1
    assert [r.attempt for r in labeler.asked if "green" in r.subject] == [0, 1, 2]
    with pytest.raises(DataError, match="no answer of 1"):
        run(faith, answered("A green it is."))


def test_a_sub_sentence_that_was_not_understood_is_never_faithful() -> None:
    """The scene parser cannot read the second one: 1 of 1, not 2 of 2; and no facts at all: out."""
    verifier = YesNoVerifier(Scripted(by=lambda _: "yes"), load_fact_prompt("statement"))
    faith = FaithScorer(SceneFacts(), verifier, None)
    text = "There is a red moon. Colourless green ideas sleep furiously."
    scored = run(faith, answered(text))
    assert scored.counts["segments_malformed"] == 1
    assert scored.metrics()["faithscore_s"] == 1.0
    assert [part["faithful"] for part in scored.items[0]["descriptive"]] == [True, None]
    with pytest.raises(DataError, match="'answers_unextracted': 1"):
        run(faith, answered("Colourless green ideas sleep furiously."))


def test_a_model_that_cannot_be_asked_stops_the_benchmark() -> None:
    with pytest.raises(ServiceError, match="refused"):
        run(scorer(Scripted(STOPPED)))


@pytest.mark.parametrize(
    ("reply", "labels"),
    [
        ('{"labels": ["descriptive", "analytical"]}', (True, False)),
        ('["analytical", "descriptive"]', (False, True)),
        ("Sure:\n1. Descriptive\n2) **analytical**\n", (True, False)),
        ("[1] analytical\n2: analytical.", (False, False)),
        ('{"labels": ["descriptive"]}', None),
        ('{"labels": ["descriptive", "poetic"]}', None),
        ('{"labels": "descriptive"}', None),
        ('{"labels": [["descriptive"], {}]}', None),
        ("1. descriptive\n1. analytical", None),
        ("2. descriptive", None),
        ("3", None),
        ("", None),
    ],
)
def test_labels_are_read_strictly(reply: str, labels: tuple[bool, ...] | None) -> None:
    assert read_labels(reply, 2) == labels


@pytest.mark.parametrize(
    ("statement", "noun"),
    [
        ("There is a dog.", "dog"),
        ("There are two small dogs.", "dog"),
        ("There is a wine glass on the table.", "glass"),
        ("A bowl of fruit is there.", "bowl"),
        ("There are children who play", "child"),
        ("...", None),
    ],
)
def test_the_entity_of_an_object_fact(statement: str, noun: str | None) -> None:
    assert entity(statement) == noun


def test_a_sub_sentence_is_judged_by_the_entities_it_names() -> None:
    """A failed object fact, and a failed colour of a true object, wherever they were said; a car is
    no carpet, and a word that no object fact names fails nothing."""
    stated: list[tuple[Kind, str, Answer]] = [
        ("object", "There is a car.", "no"),
        ("object", "There are dogs.", "yes"),
        ("object", "There is a tree.", "yes"),
        ("attribute", "The dog is blue.", "no"),
        ("attribute", "The sky is green.", "no"),
        ("relation", "The tree is old.", "unknown"),
    ]
    facts = [Fact(kind=kind, text=text, segment=0) for kind, text, _ in stated]
    verdicts = {text: answer for _, text, answer in stated}
    pieces = ["Cars pass,", "a carpet lies there,", "one Dog barks,", "the sky, a tree"]
    assert faithful(pieces, facts, verdicts) == [False, True, False, True]


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_lines_name_image_and_answer(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    rows = [
        {"answer": "One.", "image": "1.png"},
        {"text": "", "image": "1.png", "prompt": "Describe."},
        {"answer": "Three.", "image": "1.png", "question_id": 7},
    ]
    found = read_lines(lines(tmp_path / "a.jsonl", rows), tmp_path)
    assert [(item.id, item.answer) for item in found] == [
        ("1.png", "One."),
        ("1.png#2", ""),
        ("7", "Three."),
    ]
    assert found[1].question == "Describe."
    assert found[0].ref.path == str(tmp_path / "1.png")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "x"}, "a.jsonl:2: no key `image`"),
        ({"image": "1.png"}, "a.jsonl:2: no key `answer` or `text`"),
        ({"image": "1.png", "answer": None}, "a.jsonl:2: key `answer`"),
        ({"image": "2.png", "answer": "x"}, "a.jsonl:2: key `image`: .*no such file"),
        ({"image": "../1.png", "answer": "x"}, "a.jsonl:2: key `image`: .*outside"),
        ({"image": "1.png", "answer": "x", "id": "first"}, "a.jsonl:2: key `id`: 'first'"),
    ],
)
def test_wrong_lines_are_named_with_row_and_key(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for folder in (root, tmp_path):
        Image.new("RGB", (4, 4)).save(folder / "1.png")
    first = {"answer": "One.", "image": "1.png", "id": "first"}
    with pytest.raises(DataError, match=message):
        read_lines(lines(tmp_path / "a.jsonl", [first, row]), root)
