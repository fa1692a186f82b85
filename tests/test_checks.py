"""What makes figures doubtful is said beside them: console, JSON, tables and pages."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_calls import eval_command

from fgaif.eval.checks import general_checks, language_check, warned
from fgaif.eval.scored import Scored
from fgaif.types import Json

__all__ = ["eval_command"]
Run = Callable[..., tuple[int, str, str]]


def scored(items: int, texts: tuple[str, ...] = (), **counts: int) -> Scored:
    return Scored(
        benchmark="b",
        ids=tuple(map(str, range(items))),
        units=tuple(map(str, range(items))),
        stats=np.zeros((items, 1)),
        figures=lambda sums: {},
        items=tuple({"answer": text} for text in texts),
        counts=counts,
    )


@pytest.mark.parametrize(("reason", "said"), [
    ("judge_unreadable", "2 of 21 judgements failed"),
    ("answers_unverified", "2 of 21 answers are left out because a stage failed"),
    ("captions_without_truth", "2 of 21 answers fit nothing"),
    ("images_unusable", "2 of 21 questions are left out"),
])  # fmt: skip
def test_more_than_one_in_twenty_left_out_is_said(reason: str, said: str) -> None:
    [sentence] = general_checks(scored(19, **{reason: 2}), descriptions=False)
    assert sentence.startswith(f"b: {said}")
    assert general_checks(scored(19, **{reason: 1}), descriptions=False) == []


def test_a_script_that_the_splitter_does_not_know_is_said() -> None:
    thai = "สุนัขนั่งอยู่บนพื้นหญ้า แมวนอนหลับ"
    [sentence] = general_checks(scored(2, ("A dog.", thai)), descriptions=True)
    assert "1 of 2 answers are in a script" in sentence
    assert "(thai)" in sentence
    known = ("A dog.", "狗坐在草地上。", "कुत्ता घास पर है।", "", "123")
    assert general_checks(scored(5, known), descriptions=True) == []
    assert general_checks(scored(2, ("A dog.", thai)), descriptions=False) == []


def test_texts_that_are_not_english_are_said() -> None:
    english = ("A dog runs on the grass.", "Nice!", "Two dogs, three cats and seven hens, no cows.")
    assert language_check("b", english, "rules") == []
    [sentence] = language_check("b", (*english, "Собака стоит"), "rules")
    assert (
        "1 of 4 texts do not look English, as 'Собака стоит'; rules know English only" in sentence
    )
    french = "Un chien noir court dans une grande prairie verte"
    assert language_check("b", (french,), "rules")


def test_sentences_are_logged_and_returned(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(logging.getLogger("x"), ["a"], [], ["b", "c"]) == ("a", "b", "c")
    assert [record.getMessage() for record in caplog.records] == ["a", "b", "c"]


@pytest.fixture
def chair(run: Run) -> tuple[object, ...]:
    tree: Json = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 1}],
    }
    Path("instances.json").write_text(json.dumps(tree))
    Path("synonyms.txt").write_text("dog, puppy\ncat\n")
    Path("c.jsonl").write_text(json.dumps({"image_id": 1, "caption": "A dog."}) + "\n")
    return ("chair", "--annotations", "instances.json", "--captions", "c.jsonl", "--out", "o")


def test_our_table_is_said_to_be_ours_wherever_figures_stand(
    run: Run, chair: tuple[object, ...]
) -> None:
    code, out, _ = run(*chair)
    assert (code, "beware: objects were counted with fgaif's own table" in out) == (0, True)
    tree = json.loads(Path("o/chair.json").read_text())
    assert [w[:29] for w in tree["warnings"]] == ["objects were counted with fga"]
    for name in ("results.md", "results.html"):
        assert "data/synonyms.txt of LisaAnne/Hallucination" in Path("o", name).read_text()
    assert json.loads(Path("o/results.json").read_text())["chair"]["warnings"] == tree["warnings"]


def test_with_a_table_given_there_is_nothing_to_say(run: Run, chair: tuple[object, ...]) -> None:
    code, out, _ = run(*chair, "--synonyms", "synonyms.txt", "--json")
    assert (code, json.loads(out)["warnings"]) == (0, [])
    Path("c.jsonl").write_text(json.dumps({"image_id": 1, "caption": "Ein Hund."}) + "\n")
    code, out, _ = run(*chair, "--synonyms", "synonyms.txt", "--json")
    [sentence] = json.loads(out)["warnings"]
    assert "1 of 1 captions name no object of the synonym table; chair_i has no value" in sentence
