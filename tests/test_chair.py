"""CHAIR: words to objects, and the three figures by hand."""

import os
from pathlib import Path

import pytest

from fgaif.errors import DataError
from fgaif.eval.chair import Vocabulary, chair, singulars

COCO_LIKE = Vocabulary.from_lines(
    ["person, girl, man, child", "dog, puppy", "hot dog", "knife", "bus", "traffic light, signal"],
    phrases={"baby dog": "dog"},
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man and two girls.", ["person", "person"]),
        ("A hot dog, a baby dog and dogs.", ["hot dog", "dog", "dog"]),
        ("Knives on buses near traffic lights", ["knife", "bus", "traffic light"]),
        ("The children's men", ["person"]),
        ("nothing of note; hotdogs", []),
        ("", []),
    ],
)
def test_mentions_are_found_in_order_longest_phrase_first(text: str, expected: list[str]) -> None:
    assert COCO_LIKE.mentions(text) == expected


def test_a_plain_vocabulary_reads_plurals_and_any_case() -> None:
    assert Vocabulary.from_nouns(["moon", "cross"]).mentions("MOONS, crosses; moonlight") == [
        "moon",
        "cross",
    ]


def test_a_synonym_in_two_lines_belongs_to_the_last() -> None:
    assert Vocabulary.from_lines(["cat, pet", "dog, pet"]).mentions("a pet") == ["dog"]


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(DataError, match="synonym table is empty"):
        Vocabulary.from_lines(["", " , "])


@pytest.mark.parametrize(("word", "form"), [("wolves", "wolf"), ("pies", "pie"), ("men", "man")])
def test_singular_forms_hold_the_right_one(word: str, form: str) -> None:
    assert form in singulars(word)


def test_figures_by_hand_count_mentions_not_types() -> None:
    """Caption 1: moon, moon, star of {moon}; caption 2: ring of {ring, tree}; caption 3: nothing.

    CHAIR_i = 1 / 4 mentions, CHAIR_s = 1 / 3 captions, recall = (1 + 1 + 0) / (1 + 2 + 1).
    """
    scores = chair([["moon", "moon", "star"], ["ring"], []], [["moon"], ["ring", "tree"], ["star"]])
    assert (scores.chair_s, scores.chair_i, scores.recall) == (1 / 3, 1 / 4, 2 / 4)


def test_without_captions_there_are_no_figures() -> None:
    scores = chair([], [])
    assert (scores.chair_s, scores.chair_i, scores.recall) == (None, None, None)


@pytest.mark.skipif(
    "FGAIF_CHAIR_SYNONYMS" not in os.environ, reason="the official table is not in this repository"
)
def test_the_official_table_has_eighty_objects() -> None:
    lines = Path(os.environ["FGAIF_CHAIR_SYNONYMS"]).read_text(encoding="utf-8").splitlines()
    table = Vocabulary.from_lines(lines)
    assert len(set(table.phrases.values())) == 80
    assert table.mentions("Two skateboarders near a parking meter") == ["person", "parking meter"]
