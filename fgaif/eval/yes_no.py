"""Yes/no questions about images: answers found and read, and the figures of a two-way choice."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fgaif.errors import DataError
from fgaif.eval.answers import AnswerRow, image_name
from fgaif.eval.scored import Stats


@dataclass(frozen=True, slots=True, kw_only=True)
class YesNoQuestion:
    """A question whose answer is yes (``label`` True) or no; ``image`` is a file name.

    ``where`` is its row in a file, as FILE:LINE.
    """

    where: str
    id: str
    image: str
    text: str
    label: bool


def read_strictly(text: str) -> bool | None:
    """Read a free answer by its first word, yes or no in any case; None if it is neither."""
    word = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return word[1].lower() == "yes" if word else None


def pair_answers(
    questions: Sequence[YesNoQuestion], answers: Sequence[AnswerRow]
) -> tuple[dict[str, AnswerRow], int]:
    """Find the answer to each question: (answers by question id, number of answers left over).

    By id where the answers have ids. Otherwise by image and question text, or by the text alone,
    if that tells all questions apart; else the rows must be as many as the questions, with the same
    text row by row. What an answer says of its image and question must be true.

    Raises:
        DataError: an answer is to another question than its place says, or cannot be placed.
    """
    if not answers:
        return {}, 0
    key = _pairing_key(questions, answers)
    if key is None:
        for question, answer in zip(questions, answers, strict=True):
            _check_pair(question, answer)
        return {q.id: answer for q, answer in zip(questions, answers, strict=True)}, 0
    by_key: dict[tuple[str | None, ...], AnswerRow] = {}
    for answer in answers:
        first = by_key.setdefault(_name(answer, key), answer)
        if first is not answer:
            raise DataError(
                f"{answer.where}: answers the question of {first.where} again; keep one"
            )
    paired: dict[str, AnswerRow] = {}
    for question in questions:
        found = by_key.get(_name(question, key))
        if found is not None:
            _check_pair(question, found)
            paired[question.id] = found
    return paired, len(answers) - len(paired)


def _name(row: YesNoQuestion | AnswerRow, key: tuple[str, ...]) -> tuple[str | None, ...]:
    parts: dict[str, str | None]
    if isinstance(row, YesNoQuestion):
        parts = {"id": row.id, "image": image_name(row.image), "question": row.text}
    else:
        # A prompt ends with an instruction on a line of its own; the official shell script writes
        # the line break as a backslash and an n.
        question = re.split(r"\n|\\n", row.question or "")[0].strip()
        parts = {"id": row.id, "image": row.image, "question": question}
    return tuple(parts[part] for part in key)


def _pairing_key(
    questions: Sequence[YesNoQuestion], answers: Sequence[AnswerRow]
) -> tuple[str, ...] | None:
    """Name what tells questions apart and all answers say, or None: row by row."""
    if all(answer.id is not None for answer in answers):
        return ("id",)
    for answer in answers:
        if answer.question is None:
            raise DataError(
                f"{answer.where}: no key `question_id`, nor `question`; without one of them nobody "
                "can tell which question is answered"
            )
    keys: list[tuple[str, ...]] = [("question",)]
    if all(answer.image is not None for answer in answers):
        keys.insert(0, ("image", "question"))
    for key in keys:
        if len({_name(question, key) for question in questions}) == len(questions):
            return key
    if len(answers) != len(questions):
        raise DataError(
            f"{answers[-1].where}: {len(answers)} answers without `question_id` or `image` to "
            f"{len(questions)} questions; without them all must be answered, in order"
        )
    return None


def _check_pair(question: YesNoQuestion, answer: AnswerRow) -> None:
    """Raise DataError unless image and text agree; a prompt may add to the question."""
    if answer.text == question.text:
        raise DataError(
            f"{answer.where}: key `text`: repeats the question {question.text!r:.60}; give the "
            "answers' file, not the questions'"
        )
    if answer.question is not None and question.text not in answer.question:
        raise DataError(
            f"{answer.where}: key `question` (or `prompt`): {answer.question!r:.120} is not "
            f"{question.text!r}, which {question.where} asks; give the answers to these questions"
        )
    if answer.image is not None and answer.image != image_name(question.image):
        raise DataError(
            f"{answer.where}: key `image`: {answer.image!r}, but {question.where} asks about "
            f"{question.image!r}; give the answers to these questions"
        )


def yes_no_figures(
    *, questions: Stats, true: Stats, correct: Stats, said: Stats, hits: Stats
) -> dict[str, Stats]:
    """Compute the figures of yes/no questions from counts of one shape.

    precision = hits / said, recall = hits / true, F1 = 2 precision recall / (precision + recall),
    each 0 without a denominator; accuracy and yes ratio are per question, NaN without any.

    Args:
        questions: answered questions.
        true: those whose answer is yes, the positive class.
        correct: those answered right.
        said: those answered yes.
        hits: those rightly answered yes.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(said > 0, hits / said, 0.0)
        recall = np.where(true > 0, hits / true, 0.0)
        return {
            "accuracy": correct / questions,
            "precision": precision,
            "recall": recall,
            "f1": np.where(hits > 0, 2 * precision * recall / (precision + recall), 0.0),
            "yes_ratio": said / questions,
        }
