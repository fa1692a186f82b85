"""Yes/no questions about images: answers found and read, and the figures of a two-way choice."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fgaif.errors import DataError
from fgaif.eval.answers import AnswerRow, image_finder, image_name
from fgaif.eval.rows import warn_of_repeats
from fgaif.eval.scored import Stats

_PLACEHOLDER = re.compile(r"<image>|</?Img>|<ImageHere>|<\|image\|>", re.IGNORECASE)
_SPEAKER = re.compile(r"\s*(?:#+\s*)?(?:USER|Human|Question|Q)\s*:\s*", re.IGNORECASE)
_ANSWERER = re.compile(r"\s*(?:#+\s*)?(?:ASSISTANT|GPT|Answer|A)\s*:", re.IGNORECASE)
_INSTRUCTION = re.compile(r"\s*(?:please\s+)?answer\b[^.:\n]*\.", re.IGNORECASE)


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
    text row by row. A prompt may hold more than the question. What an answer says of its image and
    question must be true. An equal answer to the same question counts once, with a warning.

    Raises:
        DataError: an answer is to another question than its place says, or cannot be placed.
    """
    if not answers:
        return {}, 0
    answers = _as_questions_name_them(questions, answers)
    key = _pairing_key(questions, answers)
    if key is None:
        for question, answer in zip(questions, answers, strict=True):
            _check_pair(question, answer)
        return {q.id: answer for q, answer in zip(questions, answers, strict=True)}, 0
    asked = {question.text for question in questions}
    by_key: dict[tuple[str | None, ...], AnswerRow] = {}
    repeated = 0
    for answer in answers:
        first = by_key.setdefault(_name(answer, key, asked), answer)
        if first is answer:
            continue
        if first.text != answer.text:
            raise DataError(
                f"{answer.where}: answers the question of {first.where} again; keep one"
            )
        repeated += 1
    warn_of_repeats(answers[0].where.rpartition(":")[0], repeated)
    paired: dict[str, AnswerRow] = {}
    for question in questions:
        found = by_key.get(_name(question, key, asked))
        if found is not None:
            _check_pair(question, found)
            paired[question.id] = found
    return paired, len(by_key) - len(paired)


def _as_questions_name_them(
    questions: Sequence[YesNoQuestion], answers: Sequence[AnswerRow]
) -> list[AnswerRow]:
    """Give answers the images' names and the ids as the questions have them: "101.jpg" for "101",
    and "1" for "0001" where only leading zeros tell them apart."""
    find = image_finder(image_name(question.image) for question in questions)
    ids = _same_number([question.id for question in questions])
    return [
        replace(
            answer,
            image=find(answer.image) if answer.image is not None else None,
            id=ids(answer.id) if answer.id is not None else None,
        )
        for answer in answers
    ]


def _same_number(known: Sequence[str]) -> Callable[[str], str]:
    names = set(known)
    counts = Counter(name.lstrip("0") for name in names if name.isdecimal())
    numbers = {name.lstrip("0"): name for name in names if name.isdecimal()}

    def find(name: str) -> str:
        number = name.lstrip("0")
        if name in names or not name.isdecimal() or counts[number] != 1:
            return name
        return numbers[number]

    return find


def question_in(prompt: str, asked: Iterable[str]) -> str:
    """Return the one of the questions ``asked`` that a prompt puts; else its first line.

    Before the question may stand a placeholder of the image, the speaker's name or a system prompt
    (with examples: the last question counts), after it an instruction.
    """
    # The official shell script writes the line break as a backslash and an n.
    text = _PLACEHOLDER.sub("", prompt).strip().replace("\\n", "\n")
    lines = [_SPEAKER.sub("", line, count=1).strip() for line in text.split("\n")]
    known = asked if isinstance(asked, set) else set(asked)
    for line in reversed(lines):
        if line in known:
            return line
    # The one that ends last; of two that end there the longer.
    inside = [(text.rfind(one) + len(one), len(one), one) for one in known if one in text]
    return max(inside)[2] if inside else next(filter(None, lines), "")


def without_echo(text: str, question: str) -> str:
    """Return what an answer says after repeating the question, its instruction and the speakers'
    names; the whole answer where it does not begin so."""
    rest = _SPEAKER.sub("", _PLACEHOLDER.sub("", text), count=1).lstrip()
    if not rest.startswith(question):
        return text
    rest = _INSTRUCTION.sub("", rest[len(question) :], count=1)
    return _ANSWERER.sub("", rest, count=1)


def _name(
    row: YesNoQuestion | AnswerRow, key: tuple[str, ...], asked: set[str]
) -> tuple[str | None, ...]:
    parts: dict[str, str | None]
    if isinstance(row, YesNoQuestion):
        parts = {"id": row.id, "image": image_name(row.image), "question": row.text}
    else:
        question = question_in(row.question, asked) if row.question and "question" in key else None
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
        if len({_name(question, key, set()) for question in questions}) == len(questions):
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
