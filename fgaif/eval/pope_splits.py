"""One file of answers to all splits of POPE, numbered through, as LLaVA's evaluation writes it.

Its list of questions (``llava_pope_test.jsonl``: ``question_id, image, text, category``) says which
split, image and question an id is of. Without the list the splits are told by their questions, if
the file has as many answers and repeats the questions.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, permutations
from pathlib import Path

from fgaif.errors import DataError
from fgaif.eval.answers import AnswerRow, check_ids, image_name
from fgaif.eval.rows import read_rows
from fgaif.eval.yes_no import YesNoQuestion, question_in

log = logging.getLogger(__name__)

REMEDY = (
    "add LLaVA's list of questions, llava_pope_test.jsonl, as one more --questions (it says which "
    "split an id is of), or cut the file into one per split and name them --answers SPLIT=FILE"
)
LLAVA_ORDER = ("adversarial", "popular", "random")
"""Taken where it fits, whether or not another order of the splits does as well."""
_MOST_SPLITS = 4  # all orders of the splits are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedQuestion:
    """A question of the list; ``split`` is its category, ``where`` its row."""

    where: str
    split: str
    image: str
    text: str


def is_question_list(path: Path) -> bool:
    """Whether a file names categories and holds no labels.

    Raises:
        DataError: the file cannot be read.
    """
    first = read_rows(path)[0].data
    return "category" in first and "label" not in first


def read_question_list(path: Path) -> dict[str, ListedQuestion]:
    """Read the list by question id.

    Raises:
        DataError: the file or a row cannot be used (names row and key), or an id comes twice.
    """
    listed = {
        row.where: (
            row.identity("question_id"),
            ListedQuestion(
                where=row.where,
                split=row.text("category"),
                image=image_name(row.text("image")),
                text=row.text("text"),
            ),
        )
        for row in read_rows(path)
    }
    check_ids((where, identity) for where, (identity, _) in listed.items())
    return dict(listed.values())


def split_answers(
    questions: Mapping[str, Sequence[YesNoQuestion]],
    answers: Sequence[AnswerRow],
    listed: Mapping[str, ListedQuestion] | None = None,
) -> dict[str, list[AnswerRow]]:
    """Give each split its answers of one file.

    Raises:
        DataError: an answer's id is not in the list or its prompt is another question's; without a
            list: the splits cannot be told apart. The message says what would help.
    """
    if listed is not None:
        return _by_list(questions, answers, listed)
    numbered = all(answer.id is not None and answer.id.isdecimal() for answer in answers)
    rows = sorted(answers, key=lambda a: int(a.id or 0)) if numbered else list(answers)
    where = answers[0].where.rpartition(":")[0]
    total = sum(map(len, questions.values()))
    if len(rows) != total or len(questions) > _MOST_SPLITS:
        raise DataError(
            f"{where}: one file of {len(rows)} answers to {len(questions)} splits of {total} "
            f"questions; {REMEDY}"
        )
    fitting = [order for order in permutations(questions) if _fits(rows, order, questions)]
    if LLAVA_ORDER in fitting:
        fitting = [LLAVA_ORDER]
    if len(fitting) != 1:
        how = "in no order of the splits" if not fitting else "in several orders of the splits"
        raise DataError(f"{where}: its answers repeat the questions {how}; {REMEDY}")
    (order,) = fitting
    log.warning("%s: one file for all splits, taken in the order %s", where, ", ".join(order))
    ends = [0]
    for split in order:
        ends.append(ends[-1] + len(questions[split]))
    return {
        split: [
            replace(answer, id=question.id)
            for answer, question in zip(rows[begin:end], questions[split], strict=True)
        ]
        for split, (begin, end) in zip(order, pairwise(ends), strict=True)
    }


def _fits(
    rows: Sequence[AnswerRow],
    order: Sequence[str],
    questions: Mapping[str, Sequence[YesNoQuestion]],
) -> bool:
    asked = chain.from_iterable(questions[split] for split in order)
    return all(
        answer.question is not None
        and question.text in answer.question
        and answer.image in (None, image_name(question.image))
        for answer, question in zip(rows, asked, strict=True)
    )


def _by_list(
    questions: Mapping[str, Sequence[YesNoQuestion]],
    answers: Sequence[AnswerRow],
    listed: Mapping[str, ListedQuestion],
) -> dict[str, list[AnswerRow]]:
    asked = {split: {question.text for question in part} for split, part in questions.items()}
    categories = {question.split for question in listed.values()}
    if not categories & questions.keys():
        raise DataError(
            f"the list of questions has the categories {', '.join(sorted(categories))}, "
            f"--questions the splits {', '.join(questions)}; name them with "
            "--questions CATEGORY=FILE"
        )
    found: dict[str, list[AnswerRow]] = {split: [] for split in questions}
    for answer in answers:
        question = listed.get(answer.id or "")
        if question is None:
            raise DataError(
                f"{answer.where}: key `question_id`: {answer.id!r} is not in the list of "
                "questions; give the list that was answered"
            )
        if answer.question is not None and question_in(question.text, ()) not in answer.question:
            raise DataError(
                f"{answer.where}: key `prompt`: {answer.question!r:.120} is not the question of "
                f"{question.where}; give the list that was answered"
            )
        if question.split not in found:
            continue
        text = question.text
        if question_in(text, asked[question.split]) not in asked[question.split]:
            text = text.replace("imange", "image")  # misspelt in LLaVA's copy of the questions
        found[question.split].append(replace(answer, id=None, image=question.image, question=text))
    return found
