"""Answer and caption files in the formats of other tools."""

import json
from pathlib import Path

import pytest

from fgaif.errors import DataError
from fgaif.eval.answers import image_name, read_answers, read_captions


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("COCO_val2014_000000310196.jpg", "310196"),
        ("images/val2014/COCO_val2014_000000310196.jpg", "310196"),
        ("000000310196.jpg", "310196"),
        ("000000310196", "310196"),
        (310196, "310196"),
        ("310196", "310196"),
        ("C:\\photos\\beach 1.png", "beach 1.png"),
        ("12.png", "12.png"),
    ],
)
def test_an_image_has_one_name_in_all_files(value: str | int, name: str) -> None:
    assert image_name(value) == name


def test_answers_of_model_vqa_and_of_pope(tmp_path: Path) -> None:
    vqa = {
        "question_id": 7,
        "prompt": "Is there a dog in the image?",
        "text": "Yes",
        "answer_id": "aX",
        "model_id": "m",
        "metadata": {},
    }
    (answer,) = read_answers(write(tmp_path / "vqa.jsonl", vqa))
    assert (answer.id, answer.question, answer.text) == ("7", vqa["prompt"], "Yes")
    assert (answer.image, answer.where) == (None, f"{tmp_path / 'vqa.jsonl'}:1")
    own = [{"question": "Is there a cat?", "answer": ""}, {"question": "Q", "answer": "no"}]
    for path in (write(tmp_path / "own.json", *own), tmp_path / "list.json"):
        (tmp_path / "list.json").write_text(json.dumps(own, indent=1), encoding="utf-8")
        assert [(a.id, a.question, a.text) for a in read_answers(path)] == [
            (None, "Is there a cat?", ""),
            (None, "Q", "no"),
        ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 2}, r"a\.jsonl:2: no key `text` or `answer`, only question_id"),
        ({"question_id": 2, "text": 1}, r"a\.jsonl:2: key `text`: 1: expected a text"),
        ({"question_id": [2], "text": ""}, r"a\.jsonl:2: key `question_id`: \[2\]: expected"),
        (
            {"question_id": "1", "text": "no"},
            r"a\.jsonl:2: key `question_id`: '1' was used at",
        ),
        ({"question": 5, "text": ""}, r"a\.jsonl:2: key `question`: 5: expected a text"),
        ({"image": {}, "text": ""}, r"a\.jsonl:2: key `image`: \{\}: expected"),
        ([1], r"a\.jsonl:2: \[1\]: a row must be an object"),
    ],
)
def test_a_wrong_answer_row_is_named_with_its_key(
    tmp_path: Path, row: object, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", {"question_id": 1, "text": "yes"}, row)
    with pytest.raises(DataError, match=message):
        read_answers(path)


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text('{"question_id": 1, "text": "yes"}\n{"question_id": 2, "te', encoding="utf-8")
    with pytest.raises(DataError, match=r"cut\.jsonl:2: not valid JSON"):
        read_answers(path)


def test_captions_in_all_forms_read_the_same(tmp_path: Path) -> None:
    pairs = [(42, "A dog."), (43, "Two cats.")]
    rows = [{"image_id": image, "caption": text} for image, text in pairs]
    original = {
        "overall": {"CIDEr": 1.0},
        "imgToEval": {str(image): {"image_id": image, "caption": text} for image, text in pairs},
    }
    (tmp_path / "original.json").write_text(json.dumps(original, indent=2), encoding="utf-8")
    (tmp_path / "line.json").write_text(json.dumps(original), encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    vqa = [
        {"question_id": n, "prompt": "Describe.", "text": text} for n, (_, text) in enumerate(pairs)
    ]
    flags = [{"img": f"COCO_val2014_{image:012d}.jpg", "out": text} for image, text in pairs]
    read = [
        read_captions(tmp_path / "original.json"),
        read_captions(tmp_path / "line.json"),
        read_captions(tmp_path / "list.json"),
        read_captions(write(tmp_path / "lines.jsonl", *rows)),
        read_captions(write(tmp_path / "vqa.jsonl", *vqa), images={"0": "42", "1": "43"}),
        read_captions(write(tmp_path / "flags.jsonl", *flags), image_key="img", caption_key="out"),
    ]
    for captions in read:
        assert [(c.id, c.image, c.text) for c in captions] == [
            ("42", "42", "A dog."),
            ("43", "43", "Two cats."),
        ]
    assert read[0][1].where.endswith("original.json: imgToEval['43']")
    assert read[4][0].question == "Describe."


def test_several_captions_of_an_image_keep_their_own_ids(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "text": text} for text in ("A dog.", "A cat.")]
    captions = read_captions(write(tmp_path / "c.jsonl", *rows))
    assert [caption.id for caption in captions] == ["a.png", "a.png#2"]


def test_wrong_caption_files_are_named_with_row_and_key(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", {"image_id": 1, "caption": "A dog."}, {"question_id": 5})
    with pytest.raises(DataError, match=r"c\.jsonl:2: no key `image_id` or `image`"):
        read_captions(path)
    with pytest.raises(DataError, match=r"c\.jsonl:2: key `question_id`: '5': expected the id"):
        read_captions(path, images={"4": "42"})
    with pytest.raises(DataError, match=r"c\.jsonl:1: no key `answer`"):
        read_captions(path, caption_key="answer")
    broken = tmp_path / "o.json"
    broken.write_text('{"imgToEval": [1]}', encoding="utf-8")
    with pytest.raises(DataError, match="key `imgToEval`"):
        read_captions(broken)
    broken.write_text('{"imgToEval": {"1": {"image_id": 1}}}', encoding="utf-8")
    with pytest.raises(DataError, match=r"imgToEval\['1'\]: no key `caption` or `text`"):
        read_captions(broken)
