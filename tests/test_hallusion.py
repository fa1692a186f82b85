"""HallusionBench: accuracies per question, figure and question of a set, by rule."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import eval_command
from PIL import Image

from fgaif.eval.benchmarks.hallusion import read_answer
from fgaif.types import Json

__all__ = ["eval_command"]
Run = Callable[..., tuple[int, str, str]]


def question(category: str, figure: int, number: int, truth: int) -> Json:
    """Of set 7: figure 0 is the original (VD) or none (VS), others are edited."""
    original = "1" if category == "VD" else "0"
    return {
        "category": category, "subcategory": "map", "visual_input": "2" if figure else original,
        "set_id": "7", "figure_id": str(figure), "question_id": str(number), "question": "Is it?",
        "gt_answer": str(truth), "gt_answer_details": "It is.",
        "filename": f"./{category}/map/7_{figure}.png" if figure or category == "VD" else None,
    }  # fmt: skip


# Two questions about an original figure and an edited one, and two without and with a figure.
QUESTIONS = [
    question("VD", 0, 0, 1), question("VD", 0, 1, 0), question("VD", 1, 0, 0),
    question("VD", 1, 1, 0), question("VS", 0, 0, 1), question("VS", 1, 0, 0),
]  # fmt: skip


def answered(run: Run, answers: list[str], count: int = 6) -> Json:
    Path("q.json").write_text(json.dumps(QUESTIONS))
    rows = [
        {**row, "model_prediction": text, "gt_answer": "?"}
        for row, text in zip(QUESTIONS[:count], answers, strict=True)
    ]
    Path("a.json").write_text(json.dumps(rows))
    code, out, err = run("hallusion", "--questions", "q.json", "--answers", "a.json", "--json")
    assert code == 0, err
    tree: Json = json.loads(out)
    return tree


def test_accuracies_of_questions_figures_and_pairs(run: Run) -> None:
    """Wrong are the second answer of VD's original and of its edited figure, which is unclear.
    Right without a figure is also an unclear answer."""
    tree = answered(run, ["Yes.", "Yes", "No, it is", "Hard to say", "Hard to say", "no"])
    assert (tree["aacc"], tree["facc"], tree["qacc"]) == (4 / 6, 1 / 3, 2 / 3)
    assert (tree["VD"]["aacc"], tree["VD"]["facc"], tree["VD"]["qacc"]) == (2 / 4, 0, 1 / 2)
    assert (tree["VS"]["aacc"], tree["VS"]["facc"], tree["VS"]["qacc"]) == (1, 1, 1)
    assert tree["easy"] == {"aacc": 2 / 3, "qacc": 2 / 3}
    assert tree["hard"] == {"aacc": 2 / 3, "qacc": 2 / 3}
    # Said yes: right with yes (twice) or wrong with no (twice); two of six answers are yes.
    assert (tree["yes_bias"], tree["fp_ratio"], tree["unreadable"]) == (2 / 6, 1, 2 / 6)
    assert tree["items"] == 2
    assert "2 of 6 answers say neither" in tree["warnings"][0]


def test_questions_without_an_answer_are_said(run: Run) -> None:
    tree = answered(run, ["Yes", "No"], count=2)
    assert (tree["aacc"], tree["VS"]["aacc"]) == (1, None)
    assert "4 of 6 questions are not answered" in tree["warnings"][0]


def test_without_the_questions_that_have_no_figure_it_is_said(run: Run) -> None:
    Path("q.json").write_text(json.dumps(QUESTIONS))
    rows = [
        {"question_id": f"{row['category']}_map_7_{row['figure_id']}_{row['question_id']}",
         "text": "No"}
        for row in QUESTIONS if row["filename"]
    ]  # fmt: skip
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("hallusion", "--questions", "q.json", "--answers", "a.jsonl", "--json")
    tree = json.loads(out)
    assert (code, tree["aacc"]) == (0, 4 / 5), err
    assert "the 1 questions without a figure are not answered" in tree["warnings"][0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes, it is not", True), ("The answer is no.", False), ("1", True), (" 0 ", False),
        ("no or yes?", False), ("yes or no, who knows", True), ("It is yes, or no", None),
        ("2", None), ("", None), ("Nobody knows", None),
    ],
)  # fmt: skip
def test_an_answer_is_read_by_its_first_word_or_its_only_one(text: str, said: bool | None) -> None:
    assert read_answer(text) is said


def test_rows_that_cannot_be_used_are_named(run: Run) -> None:
    Path("q.json").write_text(json.dumps([QUESTIONS[0] | {"gt_answer": "2"}]))
    Path("a.json").write_text("[]")
    code, _, err = run("hallusion", "--questions", "q.json", "--answers", "a.json")
    assert (code, "key `gt_answer`: '2': expected 0 (no) or 1 (yes)" in err) == (2, True)
    Path("q.json").write_text(json.dumps([QUESTIONS[0], QUESTIONS[0]]))
    code, _, err = run("hallusion", "--questions", "q.json", "--answers", "a.json")
    assert (code, "the question of q.json: item 1 again" in err) == (2, True)
    Path("q.json").write_text(json.dumps(QUESTIONS[:1]))
    Path("a.json").write_text(json.dumps([QUESTIONS[5] | {"model_prediction": "yes"}]))
    code, _, err = run("hallusion", "--questions", "q.json", "--answers", "a.json")
    assert (code, "no answer is to one of the questions (VS_map_7_1_0)" in err) == (2, True)


def test_images_are_found_by_their_path_alone(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """VD/map/7_0.png is there; VS/map/7_1.png and VD/map/7_1.png are not, though 7_1.png
    is. The two questions about the first have the same words."""
    Path("q.json").write_text(json.dumps(QUESTIONS))
    for name in ("VD/map/7_0.png", "VD/other/7_1.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(name)
    call = ("hallusion", "--questions", "q.json", "--model", "scenes:policy", "--out", "o")
    code, out, err = run(*call, "--images", ".", "--dry-run")
    assert (code, "1 answers to generate" in out) == (0, True), err
    assert "3 of 5 questions are left out" in caplog.text
    code, _, err = run(*call, "--images", "VD", "--dry-run")
    assert (code, "VD: holds no VD/map/7_0.png" in err) == (2, True)
