"""CHAIR: words to objects, the rules of the official script, and the figures by hand."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fgaif.data.coco import CocoImage
from fgaif.errors import DataError
from fgaif.eval.answers import Caption, read_captions
from fgaif.eval.benchmarks.chair import (
    caption_stats,
    chair_figures,
    chair_truth,
    images_listed,
    score_chair,
)
from fgaif.eval.vocabulary import Vocabulary, coco_vocabulary, singular

COCO = coco_vocabulary()
COCO_LIKE = Vocabulary.from_lines(
    ["person, girl, man, child", "dog, puppy", "hot dog", "knife", "bus", "traffic light, signal"],
    same_as={"baby dog": "dog", "man hole": None},
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man and two girls.", ["person", "person"]),
        ("A hot dog, a baby dog and dogs.", ["hot dog", "dog", "dog"]),
        ("It was hot. Dogs slept; one was hot, dog days", ["dog", "dog"]),
        ("Knives on buses near traffic lights", ["knife", "bus", "traffic light"]),
        ("The children's men and a puppy’s dog-like toy", ["person", "person", "dog"]),
        ("a man hole", []),
        ("nothing of note; hotdogs", []),
        ("", []),
    ],
)
def test_mentions_are_found_in_order_longest_phrase_first(text: str, expected: list[str]) -> None:
    assert COCO_LIKE.mentions(text) == expected


def test_a_plain_vocabulary_reads_plurals_and_any_case() -> None:
    vocabulary = Vocabulary.from_nouns(["moon", "cross", "bird's nest"])
    assert vocabulary.mentions("MOONS, crosses; moonlight and bird's nests") == [
        "moon",
        "cross",
        "bird's nest",
    ]


def test_a_synonym_in_two_lines_belongs_to_the_last() -> None:
    assert Vocabulary.from_lines(["cat, pet", "dog, pet"]).mentions("a pet") == ["dog"]


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(DataError, match="synonym table is empty"):
        Vocabulary.from_lines(["", " , "])


@pytest.mark.parametrize(
    ("word", "form"),
    [("wolves", "wolf"), ("pies", "pie"), ("men", "man"), ("geese", "goose"), ("shoes", "shoe")]
    + [(word, word) for word in ("bus", "glass", "scissors", "seated", "parking", "tennis", "'")],
)
def test_nouns_come_to_their_singular_and_nothing_else_changes(word: str, form: str) -> None:
    assert singular(word) == form


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a baby elephant and an adult giraffe", ["elephant", "giraffe"]),
        ("a baby animal with a baby", ["person"]),
        ("a passenger jet and passenger trains", ["airplane", "train"]),
        ("the passenger of a bus", ["person", "bus"]),
        ("a bow tie, a tie", ["tie", "tie"]),
        ("a toilet seat; the seat of the toilet", ["toilet", "toilet"]),
        ("seats near a table", ["chair", "dining table"]),
        ("at home plate by the train tracks", []),
        ("hot dogs, teddy bears and bears", ["hot dog", "teddy bear", "bear"]),
        ("wine glasses, a glass, a pair of glasses", ["wine glass"]),
        ("stop signs, traffic lights and parking meters", ["stop sign", "traffic light"]),
        ("people seated on skis with scissors", ["person", "skis", "scissors"]),
    ],
)
def test_phrases_of_coco_follow_the_official_rules(text: str, expected: list[str]) -> None:
    assert COCO.mentions(text)[: len(expected) or None] == expected


def test_phrases_work_with_a_table_of_the_user(tmp_path: Path) -> None:
    """ "hot dog" is no dog even in a table that lacks it; what the table says goes first."""
    (tmp_path / "table.txt").write_text("dog, baby cub\ncat\nplate\n", encoding="utf-8")
    table = coco_vocabulary(tmp_path / "table.txt")
    assert table.mentions("a hot dog, baby cats, a baby cub, home plate, plates") == [
        "cat",
        "dog",
        "plate",
    ]
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        coco_vocabulary(tmp_path / "none.txt")


def test_our_table_names_the_eighty_categories() -> None:
    assert len(COCO.objects) == 80
    assert all(COCO.mentions(name) == [name] for name in COCO.objects)


def literal_mentions(text: str, table: list[list[str]], doubles: dict[str, str]) -> list[str]:
    """The official procedure step by step: singular words, pairs merged, seats of toilets dropped,
    then the words of the table."""
    words = [singular(word) for word in re.findall(r"'s|[\w-]+|[^\w\s]", text.lower())]
    merged = []
    while words:
        pair = " ".join(words[:2])
        merged.append(doubles.get(pair, words[0]))
        words = words[2:] if pair in doubles else words[1:]
    if "toilet" in merged and "seat" in merged:
        merged = [word for word in merged if word != "seat"]
    first = {synonym: line[0] for line in table for synonym in line}
    return [first[word] for word in merged if word in first]


def test_mentions_agree_with_the_official_procedure(tmp_path: Path) -> None:
    table = [
        ["person", "man", "baby", "passenger", "adult"],
        ["chair", "seat"],
        ["dog", "puppy"],
        ["tie", "bow", "bow tie"],
        ["airplane", "jet", "air plane"],
        ["train"],
        ["wine glass"],
        ["toilet"],
    ]
    doubles = {"wine glass": "wine glass", "air plane": "air plane", "home plate": "home plate"}
    doubles |= {"train track": "train track", "bow tie": "tie", "toilet seat": "toilet"}
    doubles |= {"baby dog": "dog", "adult dog": "dog", "passenger jet": "jet"}
    doubles |= {"passenger train": "train"}
    path = tmp_path / "table.txt"
    path.write_text("\n".join(", ".join(line) for line in table), encoding="utf-8")
    vocabulary = coco_vocabulary(path)
    nouns = "man men baby passengers adult seat seats puppies dogs bow tie jets air plane train"
    nouns += " trains track wine glasses glass toilet home plate . , the man's"
    rng = np.random.default_rng(0)
    for words in rng.choice(nouns.split(), size=(500, 12)):
        text = " ".join(words)
        assert vocabulary.mentions(text) == literal_mentions(text, table, doubles), text


def test_figures_by_hand_count_mentions_not_types() -> None:
    """Caption 1: moon, moon, star of {moon}; caption 2: ring of {ring, tree}; caption 3: nothing.

    CHAIR_i = 1 / 4 mentions, CHAIR_s = 1 / 3 captions, recall = (1 + 1 + 0) / (1 + 2 + 1).
    """
    rows = [
        caption_stats(["moon", "moon", "star"], ["moon"]),
        caption_stats(["ring"], ["ring", "tree"]),
        caption_stats([], ["star"]),
    ]
    figures = chair_figures(np.array(rows).sum(axis=0))
    assert (figures["chair_s"], figures["chair_i"], figures["recall"]) == (1 / 3, 1 / 4, 2 / 4)


def test_without_captions_there_are_no_figures() -> None:
    assert np.isnan(list(chair_figures(np.zeros(7)).values())).all()


def captions(*pairs: tuple[str, str]) -> list[Caption]:
    return [
        Caption(where=f"c.jsonl:{n}", id=str(n), image=image, text=text)
        for n, (image, text) in enumerate(pairs, start=1)
    ]


def test_truth_unites_annotations_and_reference_captions() -> None:
    truth = chair_truth(
        {"1": ["dog", "potted plant", "dog"], "2": ["unheard of"]},
        {"1": ["A man walks a puppy."], "3": ["a bench"]},
        COCO,
    )
    assert truth == {
        "1": {"dog", "potted plant", "person"},
        "2": frozenset(),
        "3": {"bench"},
    }


def test_a_caption_file_is_scored_and_what_is_left_out_is_counted() -> None:
    """Image 1 shows a dog and a person: "A man, a cat, cats" has 3 mentions, 2 of them wrong.

    Image 2: "A dog." has 1 mention and shows {dog}. Words: 5 and 2. Image 9 is unknown.
    """
    scored = score_chair(
        captions(("1", "A man, a cat, cats"), ("2", "A dog."), ("9", "A dog.")),
        {"1": {"dog", "person"}, "2": {"dog"}, "3": {"cat"}},
        COCO,
        images=["1", "2", "3"],
    )
    assert scored.metrics() == {
        "chair_i": 2 / 4, "chair_s": 1 / 2, "recall": 2 / 3, "objects": 2, "length": 3.5,
    }  # fmt: skip
    assert scored.counts == {
        "captions_without_truth": 1,
        "captions_without_objects": 0,
        "images_without_caption": 1,
    }
    assert scored.units == ("1", "2")
    assert scored.items[0]["hallucinated"] == ["cat", "cat"]
    assert scored.badness is not None
    assert scored.badness.tolist() == [2, 0]
    many = scored.figures(np.array([[2, 1], [0, 2]]) @ scored.stats)
    assert many["chair_i"].tolist() == [4 / 7, 0]


def test_captions_of_unknown_images_only_are_refused() -> None:
    with pytest.raises(DataError, match=r"c\.jsonl:1: image '9'"):
        score_chair(captions(("9", "A dog.")), {"1": {"dog"}}, COCO)


def test_a_silent_caption_has_no_hallucination_rate() -> None:
    metrics = score_chair(captions(("1", "")), {"1": {"dog"}}, COCO).metrics()
    assert np.isnan(metrics["chair_i"])
    assert (metrics["chair_s"], metrics["recall"], metrics["length"]) == (0, 0, 0)


@pytest.mark.skipif("FGAIF_OFFICIAL_DATA" not in os.environ, reason="no official files")
def test_the_official_table_and_ours_agree_on_most_mentions_of_real_captions() -> None:
    folder = Path(os.environ["FGAIF_OFFICIAL_DATA"])
    official = coco_vocabulary(folder / "chair_synonyms.txt")
    assert official.objects == COCO.objects
    common = both = 0
    for caption in read_captions(folder / "lvlm_captions_llava.jsonl"):
        ours, theirs = (Counter(table.mentions(caption.text)) for table in (COCO, official))
        common, both = common + (ours & theirs).total(), both + ours.total() + theirs.total()
    assert 2 * common / both > 0.98


def test_a_list_of_images_can_be_captioned_in_place_of_drawn_ones(tmp_path: Path) -> None:
    """Rows of captions name 7 twice and 3, once by number and once by file name."""
    images = {
        i: CocoImage(id=i, file_name=f"COCO_val2014_{i:012}.jpg", objects=("dog",), captions=())
        for i in (3, 5, 7)
    }
    rows = [{"image_id": 7}, {"image": "COCO_val2014_000000000003.jpg"}, {"image_id": 7}]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [image.id for image in images_listed(images, path)] == [3, 7]
    path.write_text(json.dumps({"image_id": 9}))
    with pytest.raises(DataError, match="'9': expected an image that --annotations know"):
        images_listed(images, path)
