"""POPE: sampling rule, question and answer files, and figures by hand."""

import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fgaif.errors import DataError
from fgaif.eval.answers import AnswerRow
from fgaif.eval.benchmarks.pope import mean_metrics, pope_metrics, read_answer, score_pope
from fgaif.eval.pope_questions import (
    PopeQuestion,
    build_questions,
    build_rows,
    co_occurrence,
    indefinite,
    question_text,
    read_questions,
    write_questions,
)
from fgaif.eval.vocabulary import coco_vocabulary
from fgaif.eval.yes_no import YesNoQuestion, pair_answers, read_strictly
from fgaif.types import ImageRef

DOG = "Is there a dog in the image?"
CAT = "Is there a cat in the image?"

IMAGES = [
    (ImageRef(path=f"{i}.png", sha256=str(i)), objects)
    for i, objects in enumerate(
        [
            ("moon", "star", "tree", "apple"),
            ("moon", "star", "house"),
            ("moon", "ring", "cross"),
            ("apple", "house"),
        ]
    )
]


def of_image(questions: list[PopeQuestion], index: int) -> list[tuple[str, bool]]:
    return [(q.object, q.label) for q in questions if q.image.path == f"{index}.png"]


@pytest.mark.parametrize("strategy", ["random", "popular", "adversarial"])
def test_pairs_alternate_and_absent_objects_are_absent_and_new(strategy: str) -> None:
    questions = build_questions(IMAGES, strategy, seed=3)  # type: ignore[arg-type]
    for index, (_, objects) in enumerate(IMAGES):
        asked = of_image(questions, index)
        assert [label for _, label in asked] == [True, False] * min(3, len(objects))
        assert [name for name, label in asked if label] == list(objects[:3])
        absent = [name for name, label in asked if not label]
        assert not set(absent) & set(objects)
        assert len(set(absent)) == len(absent)


def test_popular_takes_the_most_frequent_absent_objects() -> None:
    """Counts: moon 3, star, apple, house 2, tree, ring, cross 1."""
    questions = build_questions(IMAGES, "popular")
    assert [name for name, label in of_image(questions, 3) if not label] == ["moon", "star"]
    assert of_image(questions, 0)[1] == ("house", False)


def test_adversarial_takes_what_stands_beside_the_shown_object() -> None:
    """Image 3 shows apple and house. Beside apple: moon, star, tree once each; beside house: moon,
    star once each; moon is used by then."""
    assert co_occurrence([o for _, o in IMAGES])["apple"] == ["moon", "star", "tree", "house"]
    questions = build_questions(IMAGES, "adversarial")
    assert [name for name, label in of_image(questions, 3) if not label] == ["moon", "star"]


def test_adversarial_order_can_be_given() -> None:
    questions = build_questions(IMAGES, "adversarial", related={"apple": ("ring",)})
    assert ("ring", False) in of_image(questions, 3)


def test_questions_repeat_with_the_seed_only() -> None:
    assert build_questions(IMAGES, "random", seed=1) == build_questions(IMAGES, "random", seed=1)
    assert build_questions(IMAGES, "random", seed=1) != build_questions(IMAGES, "random", seed=2)


def test_an_image_that_shows_everything_brings_no_question() -> None:
    assert build_questions(IMAGES[3:], "random") == []


def test_images_without_objects_are_refused() -> None:
    with pytest.raises(DataError, match="at least one known object"):
        build_questions([(IMAGES[0][0], ())], "random")


def test_question_text_has_the_right_article() -> None:
    question = build_questions(IMAGES, "popular", related={})[0]
    assert question.text == "Is there a moon in the image?"
    assert [indefinite(noun) for noun in ("apple", "orange", "moon")] == ["an", "an", "a"]


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes, there is.", True),
        ("No.", False),
        ("no, it does not", False),
        ("There is not a moon. Yes", False),
        ("Yes. No moon though.", True),
        ("A notable moon", True),
        ("", True),
        ("NO", True),
        ("No\nI see cats", True),
    ],
)
def test_answers_are_read_by_the_official_rule(text: str, yes: bool) -> None:
    assert read_answer(text) is yes


def test_figures_by_hand() -> None:
    """3 hits of 4 yes said and 5 true: precision .75, recall .6, F1 = 2*.45/1.35 = 2/3."""
    answers = [True, True, True, True, False, False, False, False]
    labels = [True, True, True, False, True, True, False, False]
    scores = pope_metrics(answers, labels)
    assert scores.accuracy == 5 / 8
    assert scores.precision == 0.75
    assert scores.recall == 0.6
    assert scores.f1 == pytest.approx(2 / 3)
    assert scores.yes_ratio == 0.5


def test_figures_without_a_denominator_are_zero() -> None:
    never = pope_metrics([False, False], [True, False])
    assert (never.precision, never.recall, never.f1, never.yes_ratio) == (0, 0, 0, 0)
    assert pope_metrics([False], [False]).accuracy == 1


def test_answers_and_labels_must_match() -> None:
    with pytest.raises(DataError, match="2 answers for 1"):
        pope_metrics([True, True], [True])


def test_the_overall_figure_is_the_plain_mean() -> None:
    mean = mean_metrics([pope_metrics([True], [True]), pope_metrics([True, False], [False, False])])
    assert mean.accuracy == 0.75
    assert mean.yes_ratio == 0.75


ROWS = [
    YesNoQuestion(where="q:1", id="1", image="COCO_val2014_000000000007.jpg", text=DOG, label=True),
    YesNoQuestion(
        where="q:2", id="2", image="COCO_val2014_000000000007.jpg", text=CAT, label=False
    ),
    YesNoQuestion(where="q:3", id="3", image="COCO_val2014_000000000008.jpg", text=DOG, label=True),
    YesNoQuestion(
        where="q:4", id="4", image="COCO_val2014_000000000008.jpg", text=CAT, label=False
    ),
]


def answer(where: int, text: str, **known: str) -> AnswerRow:
    return AnswerRow(where=f"a:{where}", text=text, **known)


def by_id(*texts: str) -> list[AnswerRow]:
    return [answer(n, text, id=str(n)) for n, text in enumerate(texts, start=1)]


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes, there is.", True),
        ("no", False),
        ("NO.", False),
        (" 'No'", False),
        ("Yesterday", None),
        ("There is no dog.", None),
        ("", None),
    ],
)
def test_the_strict_rule_reads_the_first_word(text: str, yes: bool | None) -> None:
    assert read_strictly(text) is yes


def test_every_category_gets_correct_grammar() -> None:
    asked = {noun: question_text(noun) for noun in coco_vocabulary().objects}
    assert asked["umbrella"] == "Is there an umbrella in the image?"
    assert asked["tv"] == "Is there a tv in the image?"
    assert asked["skis"] == "Is there a pair of skis in the image?"
    assert asked["scissors"] == "Is there a pair of scissors in the image?"
    assert asked["broccoli"] == "Is there broccoli in the image?"
    with_an = sorted(noun for noun, text in asked.items() if " an " in text)
    assert with_an == ["airplane", "apple", "elephant", "orange", "oven", "umbrella"]
    words = {"hour": "an", "unicycle": "a", "horse": "a", "uniform": "a", "onion": "an"}
    assert {word: indefinite(word) for word in words} == words


def test_a_question_file_is_built_by_the_official_rule_and_reads_back(tmp_path: Path) -> None:
    """The image of two objects takes no part, nor does "kite", which only it shows."""
    images = [
        ("a.jpg", ("dog", "dog", "skis", "cat")),
        ("b.jpg", ("dog", "cat", "cup", "bed")),
        ("c.jpg", ("dog", "kite")),
        ("d.jpg", ("bed", "cup", "oven")),
    ]
    rows = build_rows(images, "popular", count=3, seed=1)
    assert {row.image for row in rows} == {"a.jpg", "b.jpg", "d.jpg"}
    assert [row.id for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    of_a = [(row.text, row.label) for row in rows if row.image == "a.jpg"]
    assert [text for text, label in of_a if label] == [
        "Is there a dog in the image?",
        "Is there a pair of skis in the image?",
        "Is there a cat in the image?",
    ]
    absent = [text for text, label in of_a if not label]
    assert set(absent[:2]) == {"Is there a cup in the image?", "Is there a bed in the image?"}
    assert absent[2] == "Is there an oven in the image?"
    write_questions(tmp_path / "q.jsonl", rows)
    first = json.loads((tmp_path / "q.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert first == {"question_id": 1, "image": rows[0].image, "text": rows[0].text, "label": "yes"}
    again = read_questions(tmp_path / "q.jsonl")
    assert [(r.id, r.image, r.text, r.label) for r in again] == [
        (r.id, r.image, r.text, r.label) for r in rows
    ]
    with pytest.raises(DataError, match="3 of 4 images show 3 objects or more, but 4 are needed"):
        build_rows(images, "popular", count=4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a", "text": "t", "label": "yes"}, r"q\.jsonl:2: no key `question_id`"),
        (
            {"question_id": 2, "image": "a", "text": "t", "label": "maybe"},
            r"q\.jsonl:2: key `label`: 'maybe': expected yes or no",
        ),
        (
            {"question_id": 1, "image": "a", "text": "t", "label": "no"},
            r"q\.jsonl:2: key `question_id`: '1' was used at .*q\.jsonl:1",
        ),
    ],
)
def test_a_wrong_question_row_is_named_with_its_key(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    good = {"question_id": 1, "image": "a", "text": "t", "label": "yes"}
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_questions(path)


def test_answer_files_are_scored_by_both_rules() -> None:
    """Official: yes, no, yes, yes: 3 of 4 right, precision 2/3, recall 1, F1 4/5.

    Strict: yes, unreadable, unreadable, yes: 1 right, precision 1/2, recall 1/2, F1 1/2.
    """
    texts = by_id("Yes.", "There is no cat", "A dog, I think", "Yes, a cat")
    scored = score_pope({"random": ROWS}, {"random": texts})
    metrics = scored.metrics()
    official = {"accuracy": 3 / 4, "precision": 2 / 3, "recall": 1, "f1": 4 / 5, "yes_ratio": 3 / 4}
    strict = {"accuracy": 1 / 4, "precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "yes_ratio": 0.5}
    expected = official | {f"strict_{name}": value for name, value in strict.items()}
    expected["strict_unreadable"] = 1 / 2
    assert metrics == pytest.approx(
        expected | {f"random/{name}": value for name, value in expected.items()}
    )
    assert scored.badness is not None
    assert scored.badness.tolist() == [0, 0, 0, 1]
    assert scored.units == ("7", "7", "8", "8")
    assert scored.counts == {
        "questions_without_answer": 0,
        "answers_without_question": 0,
        "rules_disagree": 0,
    }
    answers = [read_answer(a.text) for a in texts]
    assert {f: metrics[f] for f in official} == pytest.approx(
        asdict(pope_metrics(answers, [row.label for row in ROWS]))
    )


def test_the_overall_figure_of_a_file_is_the_plain_mean_over_splits() -> None:
    """Random: 4 of 4 right. Popular: of 2 answered, 1 right, so 3/4 overall, not 5/6."""
    scored = score_pope(
        {"random": ROWS, "popular": ROWS},
        {"random": by_id("yes", "no", "yes", "no"), "popular": by_id("yes", "yes")},
    )
    metrics = scored.metrics()
    assert (metrics["random/accuracy"], metrics["popular/accuracy"]) == (1, 0.5)
    assert metrics["accuracy"] == 0.75
    assert scored.counts["questions_without_answer"] == 2
    assert scored.ids[:5] == ("random/1", "random/2", "random/3", "random/4", "popular/1")
    resampled = scored.figures(np.stack([scored.stats.sum(axis=0)] * 2))
    assert resampled["accuracy"].tolist() == [0.75, 0.75]


def test_a_model_that_never_says_yes_has_figures() -> None:
    metrics = score_pope({"s": ROWS}, {"s": by_id("no", "no", "no", "no")}).metrics()
    assert (metrics["precision"], metrics["recall"], metrics["f1"]) == (0, 0, 0)
    assert (metrics["accuracy"], metrics["yes_ratio"]) == (0.5, 0)
    assert pickle.loads(pickle.dumps(score_pope({"s": ROWS}, {"s": by_id("no")}))).ids == ("s/1",)


def test_answers_are_paired_by_id_in_any_order() -> None:
    answers = [*by_id("yes", "no", "yes", "no")[::-1], answer(9, "yes", id="99")]
    paired, left = pair_answers(ROWS, answers)
    assert [paired[row.id].text for row in ROWS] == ["yes", "no", "yes", "no"]
    assert left == 1


def test_without_ids_image_and_question_tell() -> None:
    answers = [
        answer(1, "no", image="8", question=CAT),
        answer(2, "yes", image="7", question=f"{DOG}\nAnswer the question using a single word."),
        answer(3, "yes", image="7", question=f"{CAT}\\nAnswer the question using a single word."),
        answer(4, "yes", image="9", question=CAT),
    ]
    paired, left = pair_answers(ROWS, answers)
    assert {key: found.where for key, found in paired.items()} == {
        "4": "a:1",
        "1": "a:2",
        "2": "a:3",
    }
    assert left == 1


def test_texts_that_repeat_are_paired_row_by_row_and_verified() -> None:
    """POPE's own answer files say neither id nor image, and each question comes per image."""
    texts = [DOG, CAT, DOG, CAT]
    answers = [answer(n, "yes", question=text) for n, text in enumerate(texts, start=1)]
    paired, left = pair_answers(ROWS, answers)
    assert [paired[row.id].where for row in ROWS] == ["a:1", "a:2", "a:3", "a:4"]
    assert left == 0
    with pytest.raises(DataError, match="a:3: 3 answers without `question_id` or `image` to 4"):
        pair_answers(ROWS, answers[:3])
    with pytest.raises(DataError, match=r"a:3: key `question` .* is not .*cat.*, which q:2 asks"):
        pair_answers(ROWS, [answers[0], answers[2], answers[1], answers[3]])
    paired, left = pair_answers(ROWS[:2], [answers[1], answer(5, "no", question="Who?")])
    assert ([*paired], left) == (["2"], 1)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([answer(1, "yes")], "a:1: no key `question_id`, nor `question`"),
        ([answer(1, "yes", id="1", question=CAT)], r"a:1: key `question` .*which q:1 asks"),
        ([answer(1, "yes", id="1", image="8")], r"a:1: key `image`: '8', but q:1 asks about"),
        (
            [answer(n, text, image="7", question=DOG) for n, text in ((1, "yes"), (2, "no"))],
            "a:2: answers the question of a:1 again",
        ),
    ],
)
def test_answers_to_other_questions_are_refused(answers: list[AnswerRow], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pair_answers(ROWS, answers)


def test_files_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(DataError, match="questions of random, but answers of popular"):
        score_pope({"random": ROWS}, {"popular": by_id("yes")})
    with pytest.raises(DataError, match="random: no answer fits a question"):
        score_pope({"random": ROWS}, {"random": [answer(1, "yes", id="77")]})


@pytest.mark.skipif("FGAIF_OFFICIAL_DATA" not in os.environ, reason="no official files")
@pytest.mark.parametrize(("split", "size"), [("random", 2910), ("popular", 3000)])
def test_official_files_ask_what_we_would_ask(split: str, size: int) -> None:
    """Theirs write "imange" after "an" and take any noun as one thing; the rest is the same."""
    folder = Path(os.environ["FGAIF_OFFICIAL_DATA"])
    rows = read_questions(folder / f"coco_pope_{split}.jsonl")
    assert (len(rows), sum(row.label for row in rows)) == (size, 1500)
    ours = {question_text(noun) for noun in coco_vocabulary().objects}
    others = {row.text.replace("imange", "image") for row in rows} - ours
    assert others == {
        f"Is there a {noun} in the image?" for noun in ("skis", "scissors", "broccoli")
    }
    always = [AnswerRow(where=row.where, id=row.id, text="Yes") for row in rows]
    metrics = score_pope({split: rows}, {split: always}).metrics()
    assert (metrics["accuracy"], metrics["recall"]) == (1500 / size, 1)
