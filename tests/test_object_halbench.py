"""Object HalBench: per response and per mention, by rule and with a judge who lists objects."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import eval_command
from fault_server import FaultServer

from fgaif.eval.benchmarks.object_halbench import listed_mentions, read_objects
from fgaif.eval.vocabulary import Vocabulary
from fgaif.types import Json

__all__ = ["eval_command"]
Run = Callable[..., tuple[int, str, str]]
ANSWERS = {
    1: "A man rides a horse, and the horse jumps over a bench.",
    2: "Two dogs play with a frisbee on the grass.",
    3: "It is a calm and peaceful day for everybody.",
}


@pytest.fixture
def files(run: Run) -> tuple[str, ...]:
    """COCO shows a person and a horse in 1, a dog in 2 (a frisbee by its caption), a cat in 3."""
    names = ["person", "horse", "dog", "cat", "frisbee", "bench"]
    shown = [(1, "person"), (1, "horse"), (2, "dog"), (3, "cat")]
    tree: Json = {
        "images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in ANSWERS],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "category_id": names.index(name)} for i, name in shown],
    }
    Path("instances.json").write_text(json.dumps(tree))
    captions = [{"image_id": 2, "caption": "Dogs with a frisbee"}]
    Path("captions.json").write_text(
        json.dumps({"images": tree["images"], "annotations": captions})
    )
    questions = [{"image_id": i, "question": f"Describe image {i}."} for i in ANSWERS]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    answers = [{"question": f"Describe image {i}.", "text": text} for i, text in ANSWERS.items()]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return (
        "object-halbench", "--annotations", "instances.json", "--annotations", "captions.json",
        "--questions", "questions.jsonl", "--answers", "answers.jsonl", "--json",
    )  # fmt: skip


def test_by_rule_every_mention_counts(run: Run, files: tuple[str, ...]) -> None:
    """Mentions: person horse horse bench; dog frisbee; none. One wrong of 6, in one of the two
    responses that name objects; covered are 4 of 5 objects."""
    code, out, err = run(*files)
    tree = json.loads(out)
    assert (code, err) == (0, "")
    assert (tree["response_hall"], tree["mention_hall"], tree["all_hall"]) == (1 / 2, 1 / 6, 1 / 3)
    assert (tree["recall"], tree["objects"]) == (4 / 5, 2)
    assert tree["counts"]["answers_without_objects"] == 1
    assert tree["provenance"]["objects"] == "by rule"


def test_a_judge_lists_each_object_once(run: Run, files: tuple[str, ...]) -> None:
    """person, horse and bench of the first, a cat and what is no object of the second; the third
    reply cannot be read, its answer is left out."""

    def reply(body: Json) -> str:
        text = str(body["messages"]).rpartition("Question:")[2]
        if "rides" in text:
            return 'Objects: ["man", "horse", "Horse", "bench"]'
        return '["cat", "joy"]' if "frisbee" in text else "none at all"

    with FaultServer(reply) as server:
        judge = ("--judge-model", "j", "--judge-url", server.base_url)
        code, out, err = run(*files, *judge)
    tree = json.loads(out)
    assert code == 0, err
    assert (tree["response_hall"], tree["mention_hall"], tree["recall"]) == (1, 2 / 4, 2 / 4)
    assert (tree["items"], tree["counts"]["judge_unreadable"]) == (2, 1)
    assert tree["provenance"]["prompt"].startswith("object_halbench-")


def test_rows_without_images_must_fit_the_questions(run: Run, files: tuple[str, ...]) -> None:
    rows = [{"question": "Describe image 2.", "text": "A dog."}] * 3
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(*files)
    assert (code, "answers.jsonl:1: answers 'Describe image 2.'" in err) == (2, True)
    Path("answers.jsonl").write_text(json.dumps(rows[0]) + "\n")
    code, _, err = run(*files)
    assert (code, "1 answers to 3 questions" in err) == (2, True)
    Path("answers.jsonl").write_text(json.dumps({"image_id": 9, "text": "A dog."}) + "\n")
    code, _, err = run(*files)
    assert (code, "give the annotations of both" in err) == (2, True)


def test_lists_are_read_from_replies() -> None:
    assert read_objects('["a"] no: ["b", "c"]') == ["b", "c"]
    assert read_objects("```json\n[]\n```") == []
    assert read_objects('["a", 1]') is None
    assert read_objects("nothing") is None
    vocabulary = Vocabulary.from_lines(["person, man", "dining table, table"])
    assert listed_mentions(["Man", "man", "dining  table", "people"], vocabulary) == [
        "person", "dining table",
    ]  # fmt: skip
