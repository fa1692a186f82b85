"""LLaVA-Bench: how the files are joined, what the judge is shown, and what its grades come to."""

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chats import Scripted

from fgaif.chat.messages import ChatRequest
from fgaif.errors import DataError
from fgaif.eval.benchmarks.llava_bench import read_grades, score_llava_bench, score_reviews
from fgaif.eval.llava_bench_files import CATEGORIES, LlavaBenchItems, load_rules, read_bench
from fgaif.eval.scored import Scored

COCO = {
    "image": "1.jpg",
    "captions": ["A cat.", "A cat on a mat."],
    "instances": [
        {"category": "cat", "bbox": [0.1, 0.25, 0.5, 1.0]},
        {"category": "mat", "bbox": [0.0, 0.5, 1.0, 1.0]},
    ],
}


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def bench(
    folder: Path,
    questions: Sequence[dict[str, Any]] | None = None,
    context: dict[str, Any] = COCO,
    answers: Sequence[dict[str, Any]] | None = None,
) -> LlavaBenchItems:
    """Three questions, one per category, about one image."""
    asked = questions or [
        {"question_id": n, "image": "1.jpg", "text": f"Question {n}?", "category": name}
        for n, name in enumerate(CATEGORIES)
    ]
    references = [{"question_id": n, "text": f"reference {n}"} for n in range(3)]
    given = answers or [{"question_id": n, "text": f"answer {n}"} for n in range(3)]
    return read_bench(
        lines(folder / "q.jsonl", asked),
        lines(folder / "r.jsonl", references),
        lines(folder / "c.jsonl", [context]),
        lines(folder / "a.jsonl", given),
    )


def score(found: LlavaBenchItems, judge: Scripted, rules: Path | None = None) -> Scored:
    return asyncio.run(score_llava_bench(found, judge, load_rules(rules, found.in_the_wild)))


def test_the_relative_score_is_a_ratio_of_means(tmp_path: Path) -> None:
    """Grades (reference, model) 8 6 | 10 5 | 5 10: 75, 50, 200, and 21/23 over all."""
    grades = {"Question 0?": "8 6", "Question 1?": "10, 5", "Question 2?": "5,10"}
    judge = Scripted(by=lambda r: next(g for q, g in grades.items() if q in r.text) + "\nBecause.")
    scored = score(bench(tmp_path), judge)
    metrics = scored.metrics()
    assert [metrics[name] for name in CATEGORIES] == [75.0, 50.0, 200.0]
    assert metrics["all"] == pytest.approx(100 * 21 / 23)
    assert metrics["reference_grade"] == pytest.approx(23 / 3)
    assert metrics["model_grade"] == pytest.approx(7.0)
    assert scored.badness is not None
    assert scored.badness.tolist() == [2.0, 5.0, -5.0]
    assert scored.units == ("1.jpg",) * 3
    assert scored.provenance["judge"] == "scripted"
    assert "llava_bench_conv-" in scored.provenance["prompt"]


def test_a_failed_judgement_is_retried_then_counted_and_never_averaged(tmp_path: Path) -> None:
    """Question 0 is graded at the second reading, question 1 never; -1 would change the ratio."""

    def answer(request: ChatRequest) -> str:
        if "Question 1?" in request.text:
            return "Assistant 2 is better."
        return "4 2" if request.attempt or "Question 0?" not in request.text else "Scores: 4 2"

    judge = Scripted(by=answer)
    scored = score(bench(tmp_path), judge)
    metrics = scored.metrics()
    assert metrics["all"] == 50.0
    assert metrics["detail"] != metrics["detail"]  # NaN: nothing was graded
    assert scored.counts["judge_unreadable"] == 1
    assert scored.ids == ("0", "2")
    assert [r.attempt for r in judge.asked if "Question 1?" in r.text] == [0, 1, 2]
    with pytest.raises(DataError, match="none of 3 replies"):
        score(bench(tmp_path), Scripted(by=lambda _: "no grades"))


def test_the_judge_is_shown_the_official_layout(tmp_path: Path) -> None:
    rules = tmp_path / "rule.json"
    text = {name: {"role": "Bot", "prompt": f"Grade {name}."} for name in CATEGORIES}
    rules.write_text(json.dumps(text | {"other": {}}))
    judge = Scripted(by=lambda _: "5 5")
    found = bench(tmp_path)
    scored = score(found, judge, rules)
    assert not found.in_the_wild
    assert judge.asked[0].text == (
        "[Context]\nA cat.\nA cat on a mat.\n\n"
        "cat: [0.1, 0.25, 0.5, 1.0]\nmat: [0.0, 0.5, 1.0, 1.0]\n\n"
        "[Question]\nQuestion 0?\n\n[Bot 1]\nreference 0\n\n[End of Bot 1]\n\n"
        "[Bot 2]\nanswer 0\n\n[End of Bot 2]\n\n[System]\nGrade conv.\n\n"
    )
    assert judge.asked[0].temperature == 0.2
    assert judge.asked[0].system
    assert "rule:conv-" in scored.provenance["prompt"]


@pytest.mark.parametrize("caption", ["A cat on a mat.", ["A cat on a mat."]])
def test_in_the_wild_the_context_is_a_caption(tmp_path: Path, caption: str | list[str]) -> None:
    rules = tmp_path / "rule.json"
    text = {
        f"llava_bench_{name}": {"role": "Bot", "prompt": f"Wild {name}."} for name in CATEGORIES
    }
    rules.write_text(json.dumps(text))
    judge = Scripted(by=lambda _: "5 5")
    found = bench(tmp_path, context={"image": "1.jpg", "caption": caption})
    assert found.in_the_wild
    score(found, judge, rules)
    assert judge.asked[2].text.startswith("[Context]\nA cat on a mat.\n\n[Question]\nQuestion 2?")
    assert judge.asked[2].text.endswith("[System]\nWild complex.\n\n")
    with pytest.raises(DataError, match="key `conv`"):
        load_rules(rules, in_the_wild=False)


@pytest.mark.parametrize(
    ("reply", "grades"),
    [
        ("8 9\nWell.", (8.0, 9.0)),
        ("8.5, 10", (8.5, 10.0)),
        ("\n7,1\n", (7.0, 1.0)),
        ("8 9 10", None),
        ("8/10 9/10", None),
        ("0 5", None),
        ("11 5", None),
        ("nan 5", None),
        ("Assistant 1: 8\n9", None),
        ("", None),
    ],
)
def test_grades_are_two_numbers_on_the_first_line(
    reply: str, grades: tuple[float, float] | None
) -> None:
    assert read_grades(reply) == grades


def test_answers_are_joined_by_id_whatever_their_order(tmp_path: Path) -> None:
    given = [
        {"question_id": "2", "text": "two", "prompt": "Question 2?\nBriefly."},
        {"question_id": 0, "text": ""},
        {"question_id": 9, "text": "nobody's"},
    ]
    found = bench(tmp_path, answers=given)
    assert [(item.id, item.reference, item.answer) for item in found.items] == [
        ("0", "reference 0", ""),
        ("2", "reference 2", "two"),
    ]
    assert found.counts == {"items_unanswered": 1, "answers_unmatched": 1, "answers_empty": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"answers": [{"question_id": 0}]}, "a.jsonl:1: no key `text`"),
        ({"answers": [{"text": "x"}]}, "a.jsonl:1: no key `question_id`"),
        (
            {"answers": [{"question_id": 0, "text": text} for text in ("x", "y")]},
            "a.jsonl:2: .*a.jsonl:1",
        ),
        ({"answers": [{"question_id": 7, "text": "x"}]}, "none is that of a question"),
        ({"answers": [{"question_id": 0, "text": "x", "prompt": "Else?"}]}, "key `prompt`"),
        ({"context": {"image": "2.jpg", "caption": "x"}}, "q.jsonl:1: key `image`: '1.jpg'"),
        ({"context": {"image": "1.jpg", "captions": ["x"]}}, "c.jsonl:1: key `instances`"),
        (
            {"questions": [{"question_id": 0, "image": "1.jpg", "text": "?", "category": "new"}]},
            "q.jsonl:1: key `category`: 'new'",
        ),
        (
            {
                "questions": [
                    {"question_id": 5, "image": "1.jpg", "text": "?", "category": "conv"}
                ],
                "answers": [{"question_id": 5, "text": "x"}],
            },
            "q.jsonl:1: key `question_id`: '5' is not in .*r.jsonl",
        ),
    ],
)
def test_wrong_files_are_named_with_row_and_key(
    tmp_path: Path, rows: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        bench(tmp_path, **rows)


def test_reviews_of_the_official_scripts_are_scored_without_their_failures(tmp_path: Path) -> None:
    """Grades 8 4 and 5 5, and a failure: 100 * 9 / 13, where averaging -1 in gives 100 * 8 / 12."""
    rows = [
        {"id": 1, "question_id": 0, "category": "conv", "content": "..", "tuple": [8.0, 4.0]},
        {"id": 2, "question_id": 1, "category": "llava_bench_detail", "tuple": [5, 5]},
        {"id": 3, "question_id": 2, "category": "complex", "content": "?", "tuple": [-1, -1]},
    ]
    path = lines(tmp_path / "review.jsonl", rows)
    scored = score_reviews(path)
    assert scored.metrics()["all"] == pytest.approx(100 * 9 / 13)
    assert scored.metrics()["conv"] == 50.0
    assert scored.counts == {"judge_unreadable": 1}
    assert scored.units == ("0", "1")
    bench(tmp_path)
    assert score_reviews(path, tmp_path / "q.jsonl").units == ("1.jpg", "1.jpg")
    with pytest.raises(DataError, match="key `tuple`: \\[5\\]"):
        score_reviews(lines(path, [rows[0], rows[1] | {"tuple": [5]}]))
    with pytest.raises(DataError, match="no review"):
        score_reviews(lines(path, [rows[2]]))


@pytest.mark.skipif("FGAIF_OFFICIAL_DATA" not in os.environ, reason="no official files")
def test_the_official_files_join_and_the_reference_against_itself_scores_100() -> None:
    folder = Path(os.environ["FGAIF_OFFICIAL_DATA"])
    found = read_bench(
        folder / "qa90_questions.jsonl",
        folder / "qa90_gpt4_answer.jsonl",
        folder / "caps_boxes_coco2014_val_80.jsonl",
        folder / "qa90_gpt4_answer.jsonl",
    )
    assert found.counts == dict.fromkeys(found.counts, 0)
    assert not found.in_the_wild
    by_category = [sum(item.category == name for item in found.items) for name in CATEGORIES]
    assert by_category == [30, 30, 30]
    assert len({item.image for item in found.items}) == 30
    judge = Scripted(by=lambda _: "9 9")
    scored = score(found, judge, folder / "rule.json")
    assert set(load_rules(folder / "rule.json", in_the_wild=True)) == set(CATEGORIES)
    assert [scored.metrics()[name] for name in (*CATEGORIES, "all")] == [100.0] * 4
    assert len(judge.asked) == 90
