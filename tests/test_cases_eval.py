"""Files as other tools write them: what can be read is read, what parts from the rule is said."""

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from fgaif.data.coco import read_coco
from fgaif.errors import DataError
from fgaif.eval.answers import (
    AnswerRow,
    Caption,
    image_finder,
    image_name,
    read_answers,
    read_captions,
)
from fgaif.eval.benchmark import EvalContext, Judges
from fgaif.eval.benchmarks.chair import score_chair
from fgaif.eval.benchmarks.pope import PopeOptions, prepare_pope, score_pope
from fgaif.eval.llava_bench_files import load_rules
from fgaif.eval.pope_questions import write_questions
from fgaif.eval.pope_splits import read_question_list, split_answers
from fgaif.eval.vocabulary import Vocabulary, coco_vocabulary
from fgaif.eval.yes_no import YesNoQuestion, pair_answers, question_in, without_echo

BOM = "\ufeff"
DOG, CAT = "Is there a dog in the image?", "Is there a cat in the image?"
IMAGES = ("COCO_val2014_000000000101.jpg", "COCO_val2014_000000000202.jpg")
QUESTIONS = [
    YesNoQuestion(where=f"q:{n}", id=str(n), image=IMAGES[(n - 1) // 2], text=text, label=label)
    for n, text, label in ((1, DOG, True), (2, CAT, False), (3, DOG, False), (4, CAT, True))
]
RIGHT = ("Yes", "No", "No", "Yes")


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pope(form: str) -> tuple[dict[str, float], dict[str, int]]:
    """Score the right answers, written as ``form`` with the slots {answer} and {question}."""
    answers = [
        AnswerRow(where=f"a:{q.id}", id=q.id, text=form.format(answer=text, question=q.text))
        for q, text in zip(QUESTIONS, RIGHT, strict=True)
    ]
    scored = score_pope({"random": QUESTIONS}, {"random": answers})
    return scored.metrics(), scored.counts


@pytest.mark.parametrize(
    ("form", "accuracy", "parted"),
    [
        ("{answer}</s>", 0.5, 2),  # every No is read as yes
        ("{answer}\n", 0.5, 2),
        ("{answer}\nUSER: And a cup?\nASSISTANT: not that", 0.5, 2),
        ("USER: <image>\n{question} ASSISTANT: {answer}", 1.0, 0),
        ("{question}\nAnswer the question using a single word or phrase. {answer}", 0.5, 2),
    ],
)
def test_answers_that_the_two_rules_read_differently_are_counted_and_said_once(
    form: str, accuracy: float, parted: int, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, counts = pope(form)
    assert metrics["accuracy"] == accuracy
    assert metrics["strict_accuracy"] == 1
    assert metrics["strict_unreadable"] == 0
    assert counts["rules_disagree"] == parted
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == (parted > 0)
    assert all("official and strict rule disagree on 2 of 4 answers" in line for line in said)


def test_answers_that_begin_with_neither_word_are_said(caplog: pytest.LogCaptureFixture) -> None:
    metrics, _ = pope("The picture says so")
    assert metrics["strict_unreadable"] == 1
    assert "4 of 4 answers begin with neither yes nor no" in caplog.text


def test_plain_answers_are_scored_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    metrics, counts = pope("{answer}.")
    assert metrics["accuracy"] == metrics["strict_accuracy"] == 1
    assert not any(counts.values())
    assert not caplog.records


@pytest.mark.parametrize(
    "prompt",
    [
        CAT,
        f"<image>\n{CAT}\nAnswer the question using a single word or phrase.",
        f"{CAT}\\nAnswer the question using a single word or phrase.",
        f"USER: <image>\n{CAT} ASSISTANT:",
        f"A chat between a human and an assistant. USER: <image>\n{CAT}\nAnswer. ASSISTANT:",
        f"Look: {DOG} Yes. And now: {CAT}",
        f"{DOG}\nYes\n{CAT}",
    ],
)
def test_the_question_is_found_in_its_prompt(prompt: str) -> None:
    assert question_in(prompt, {DOG, CAT}) == CAT
    answer = AnswerRow(where="a:1", text="No", image="101", question=prompt)
    paired, left = pair_answers(QUESTIONS, [answer])
    assert ([*paired], left) == (["2"], 0)


def test_of_two_questions_that_end_alike_the_longer_one_is_asked() -> None:
    assert question_in("Say. Is the hot dog red?", {"dog red?", "Is the hot dog red?"}) == (
        "Is the hot dog red?"
    )
    assert question_in("\nWho?\nAnswer.", {DOG}) == "Who?"


def test_only_an_answer_that_begins_with_the_question_is_cut() -> None:
    assert without_echo(f"Yes. {DOG}", DOG) == f"Yes. {DOG}"
    assert without_echo(f"Question: {DOG} Answer: no", DOG).strip() == "no"


def test_whole_numbers_written_with_a_point_are_ids(tmp_path: Path) -> None:
    rows = [{"question_id": float(n), "text": text} for n, text in enumerate(RIGHT, start=1)]
    answers = read_answers(write(tmp_path / "a.jsonl", *rows))
    assert [answer.id for answer in answers] == ["1", "2", "3", "4"]
    (caption,) = read_captions(write(tmp_path / "c.jsonl", {"image_id": 101.0, "caption": "A."}))
    assert caption.image == "101"
    with pytest.raises(DataError, match=r"key `question_id`: 1\.5: expected a number"):
        read_answers(write(tmp_path / "a.jsonl", {"question_id": 1.5, "text": "Yes"}))


def test_leading_zeros_of_ids_do_not_count_where_one_question_is_meant() -> None:
    paired, left = pair_answers(QUESTIONS, [AnswerRow(where="a:1", id="0002", text="No")])
    assert ([*paired], left) == (["2"], 0)


@pytest.mark.parametrize("name", ["101.jpg", "0101.png", "101", "x/101.jpg?download=1", 101])
def test_images_are_found_without_zeros_and_endings(name: str | int) -> None:
    answer = AnswerRow(where="a:1", text="No", image=image_name(name), question=CAT)
    paired, _ = pair_answers(QUESTIONS, [answer])
    assert [*paired] == ["2"]
    caption = Caption(where="c:1", id="x", image=image_name(name), text="A dog.")
    scored = score_chair([caption], {"101": {"dog"}, "202": set()}, Vocabulary.from_nouns(["dog"]))
    assert scored.units == ("101",)


def test_a_name_that_could_be_two_images_stays_as_it_is() -> None:
    find = image_finder(["12.png", "12.jpg", "cat.png"])
    assert [find(name) for name in ("12.png", "12", "cat", "dog")] == [
        "12.png",
        "12",
        "cat.png",
        "dog",
    ]


def test_equal_rows_count_once_and_different_ones_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question_id": n, "text": t, "answer_id": n} for n, t in ((1, "Yes"), (2, "No"))]
    path = write(tmp_path / "a.jsonl", *rows, rows[0] | {"answer_id": 9})
    assert [answer.id for answer in read_answers(path)] == ["1", "2"]
    assert "a.jsonl: 1 rows repeat an earlier one: counted once" in caplog.text
    with pytest.raises(DataError, match="'1' was used at"):
        read_answers(write(path, *rows, rows[0] | {"text": "No"}))
    caption = {"image_id": 1, "caption": "A dog."}
    captions = read_captions(write(tmp_path / "c.jsonl", caption, caption))
    assert [found.id for found in captions] == ["1"]


def test_equal_answers_without_ids_count_once(caplog: pytest.LogCaptureFixture) -> None:
    answers = [AnswerRow(where=f"a:{n}", text="No", image="101", question=CAT) for n in (1, 2)]
    paired, left = pair_answers(QUESTIONS, answers)
    assert (paired["2"].where, left) == ("a:1", 0)
    assert "a: 1 rows repeat an earlier one" in caplog.text


def test_a_prompt_that_is_only_shown_refuses_no_caption(tmp_path: Path) -> None:
    rows = [
        {"image_id": n, "caption": "A dog.", "prompt": prompt}
        for n, prompt in enumerate((["Human: <image>", "Describe."], None, 5, {"a": 1}))
    ]
    captions = read_captions(write(tmp_path / "c.jsonl", *rows))
    assert [caption.question for caption in captions] == ["Human: <image>\nDescribe.", "", "", ""]


def test_byte_order_marks_are_no_content(tmp_path: Path) -> None:
    tree = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1.0, "name": "dog"}],
        "annotations": [{"image_id": 1.0, "category_id": 1}],
    }
    instances = tmp_path / "instances.json"
    instances.write_text(BOM + json.dumps(tree), encoding="utf-8")
    assert read_coco(instances)[1].objects == ("dog",)
    table = tmp_path / "synonyms.txt"
    table.write_text(f"{BOM}dog, puppy\ncat\n", encoding="utf-8")
    assert coco_vocabulary(table).mentions("A puppy and a dog") == ["dog", "dog"]
    rules = {name: {"role": "A", "prompt": "Judge."} for name in ("conv", "detail", "complex")}
    (tmp_path / "rule.json").write_text(BOM + json.dumps(rules), encoding="utf-8")
    assert load_rules(tmp_path / "rule.json", in_the_wild=False)["conv"].role == "A"


@pytest.mark.parametrize(("silent", "warned"), [(0, False), (1, False), (2, True), (20, True)])
def test_captions_without_objects_are_counted_and_many_are_said(
    silent: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    captions = [
        Caption(where=f"c:{n}", id=str(n), image="1", text="So nice." if n < silent else "A dog.")
        for n in range(20)
    ]
    scored = score_chair(captions, {"1": {"dog"}}, Vocabulary.from_nouns(["dog"]))
    assert scored.counts["captions_without_objects"] == silent
    assert (f"{silent} of 20 captions name no object" in caplog.text) == warned


def three_splits() -> dict[str, list[YesNoQuestion]]:
    """Two questions a split, the first the same everywhere, ids from 1 in each."""
    absent = {"random": "kite", "popular": "person", "adversarial": "fork"}
    return {
        split: [
            YesNoQuestion(where=f"{split}:1", id="1", image=IMAGES[0], text=DOG, label=True),
            YesNoQuestion(
                where=f"{split}:2",
                id="2",
                image=IMAGES[0],
                text=f"Is there a {noun} in the image?",
                label=False,
            ),
        ]
        for split, noun in absent.items()
    }


ORDER = ("adversarial", "popular", "random")  # as LLaVA numbers them


def one_file(prompts: bool = True) -> list[AnswerRow]:
    """Right answers to the three splits, numbered through; the last one is wrong."""
    splits = three_splits()
    asked = [question for split in ORDER for question in splits[split]]
    texts = ["Yes", "No", "Yes", "No", "Yes", "Yes"]
    return [
        AnswerRow(
            where=f"a:{n}", id=str(n), text=text, question=f"{q.text}\nAnswer." if prompts else None
        )
        for n, (q, text) in enumerate(zip(asked, texts, strict=True), start=1)
    ]


def test_one_file_of_answers_to_three_splits_is_cut_by_its_questions(
    caplog: pytest.LogCaptureFixture,
) -> None:
    splits = three_splits()
    scored = score_pope(splits, split_answers(splits, one_file()[::-1]))
    metrics = scored.metrics()
    assert [metrics[f"{split}/accuracy"] for split in ORDER] == [1, 1, 0.5]
    assert "taken in the order adversarial, popular, random" in caplog.text


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (one_file(prompts=False), "a: .* in no order of the splits; add LLaVA's list"),
        (one_file()[:-1], "5 answers to 3 splits of 6 questions; add LLaVA's list"),
    ],
)
def test_a_file_that_cannot_be_cut_is_refused_with_a_way(
    answers: list[AnswerRow], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        split_answers(three_splits(), answers)


def test_splits_in_several_orders_are_in_llavas_or_refused() -> None:
    alike = dict.fromkeys(ORDER[::-1], three_splits()["random"])
    rows = [replace(a, question=alike["random"][n % 2].text) for n, a in enumerate(one_file())]
    assert [row.where for row in split_answers(alike, rows)["adversarial"]] == ["a:1", "a:2"]
    part = three_splits()["random"]
    answers = [replace(a, id=str(n + 2 * k)) for k in (0, 1) for n, a in enumerate(one_file()[4:])]
    with pytest.raises(DataError, match="in several orders"):
        split_answers({"random": part, "popular": part}, answers)


def list_rows() -> list[dict[str, object]]:
    splits = three_splits()
    asked = [(split, question) for split in ORDER for question in splits[split]]
    return [
        {"question_id": n, "image": q.image, "text": f"{q.text}\nAnswer.", "category": split}
        for n, (split, q) in enumerate(asked, start=1)
    ]


def test_the_list_of_questions_says_which_split_an_id_is_of(tmp_path: Path) -> None:
    rows = list_rows()
    rows[1]["text"] = str(rows[1]["text"]).replace("image", "imange")
    listed = read_question_list(write(tmp_path / "list.jsonl", *rows))
    splits = three_splits()
    for answers, accuracy in ((one_file(prompts=False), 0.5), (one_file(prompts=False)[:-1], 1)):
        metrics = score_pope(splits, split_answers(splits, answers, listed)).metrics()
        assert [metrics[f"{split}/accuracy"] for split in ORDER] == [1, 1, accuracy]
    one = {"popular": splits["popular"]}
    assert [a.where for a in split_answers(one, one_file()[2:], listed)["popular"]] == [
        "a:3",
        "a:4",
    ]
    with pytest.raises(DataError, match="a:7: key `question_id`: '7' is not in the list"):
        split_answers(splits, [AnswerRow(where="a:7", id="7", text="Yes")], listed)
    with pytest.raises(DataError, match=r"a:3: key `prompt`: .* is not the question of"):
        split_answers(splits, [AnswerRow(where="a:3", id="3", text="Yes", question=CAT)], listed)
    with pytest.raises(DataError, match="has the categories adversarial, popular, random"):
        split_answers({"q": splits["random"]}, one_file(), listed)


def test_files_of_the_three_splits_go_through_the_command(tmp_path: Path) -> None:
    files = []
    for split, part in three_splits().items():
        path = tmp_path / f"coco_pope_{split}.jsonl"
        write_questions(path, part)
        files.append(str(path))
    rows = [{"question_id": a.id, "text": a.text} for a in one_file()]
    answers = [str(write(tmp_path / "answers.jsonl", *rows))]
    whole = str(write(tmp_path / "llava_pope_test.jsonl", *list_rows()))
    context = EvalContext()
    ready = prepare_pope(PopeOptions(questions=[*files, whole], answers=answers), context)
    scored = asyncio.run(ready.score(Judges(), lambda done, total: None))
    assert scored.metrics()["accuracy"] == pytest.approx(5 / 6)
    assert ready.files["question list"] == Path(whole)
    lacking = prepare_pope(PopeOptions(questions=files, answers=answers), context)
    with pytest.raises(DataError, match="add LLaVA's list"):
        asyncio.run(lacking.score(Judges(), lambda done, total: None))
    with pytest.raises(DataError, match="holds no labels; give the questions of each split"):
        prepare_pope(PopeOptions(questions=[whole], answers=answers), context)


def test_ids_that_may_count_over_splits_are_said(caplog: pytest.LogCaptureFixture) -> None:
    splits = three_splits()
    score_pope({"random": splits["random"]}, {"random": one_file(prompts=False)})
    assert "4 of 6 answers fit no question" in caplog.text
