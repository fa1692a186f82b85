"""POPE: sampling rule, answers, and figures by hand."""

import pytest

from fgaif.errors import DataError
from fgaif.eval.pope import (
    PopeQuestion,
    build_questions,
    co_occurrence,
    indefinite,
    mean_metrics,
    pope_metrics,
    read_answer,
)
from fgaif.types import ImageRef

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
