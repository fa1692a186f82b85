"""Scores of POPE's answer files, by the official reading of an answer and by a strict one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fgaif.errors import DataError
from fgaif.eval.answers import Answer, image_name
from fgaif.eval.pope import PopeRow, read_answer
from fgaif.eval.scored import Scored, Stats
from fgaif.types import Json

COLUMNS = (
    "questions", "true", "correct", "said_yes", "hits",
    "strict_correct", "strict_said_yes", "strict_hits", "strict_unreadable",
)  # fmt: skip


def read_strictly(text: str) -> bool | None:
    """Read a free answer by its first word, yes or no in any case; None if it is neither."""
    word = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return word[1].lower() == "yes" if word else None


def pair_answers(
    questions: Sequence[PopeRow], answers: Sequence[Answer]
) -> tuple[dict[str, Answer], int]:
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
    by_key: dict[tuple[str | None, ...], Answer] = {}
    for answer in answers:
        first = by_key.setdefault(_name(answer, key), answer)
        if first is not answer:
            raise DataError(
                f"{answer.where}: answers the question of {first.where} again; keep one"
            )
    paired: dict[str, Answer] = {}
    for question in questions:
        found = by_key.get(_name(question, key))
        if found is not None:
            _check_pair(question, found)
            paired[question.id] = found
    return paired, len(answers) - len(paired)


def _name(row: PopeRow | Answer, key: tuple[str, ...]) -> tuple[str | None, ...]:
    parts: dict[str, str | None]
    if isinstance(row, PopeRow):
        parts = {"id": row.id, "image": image_name(row.image), "question": row.text}
    else:
        # A prompt ends with an instruction on a line of its own; the official shell script writes
        # the line break as a backslash and an n.
        question = re.split(r"\n|\\n", row.question or "")[0].strip()
        parts = {"id": row.id, "image": row.image, "question": question}
    return tuple(parts[part] for part in key)


def _pairing_key(questions: Sequence[PopeRow], answers: Sequence[Answer]) -> tuple[str, ...] | None:
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


def _check_pair(question: PopeRow, answer: Answer) -> None:
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


def score_pope(
    questions: Mapping[str, Sequence[PopeRow]], answers: Mapping[str, Sequence[Answer]]
) -> Scored:
    """Score answers, both given by split.

    Figures: ``accuracy``, ``precision``, ``recall``, ``f1`` and ``yes_ratio`` by the official rule,
    the same with ``strict_`` by the first word, and ``strict_unreadable``, the share of answers
    that begin with neither yes nor no (wrong by the strict rule, and not a yes); of each split as
    ``SPLIT/accuracy`` and so on, and as ``accuracy`` the plain mean over the splits. Precision,
    recall and F1 are 0 where nothing is to divide by.

    Questions without an answer are left out and counted, as are answers without a question.

    Raises:
        DataError: the splits differ, or answers fit no question.
    """
    if set(questions) != set(answers) or not questions:
        raise DataError(
            f"POPE: questions of {', '.join(sorted(questions)) or 'no split'}, but answers of "
            f"{', '.join(sorted(answers)) or 'no split'}; give both for the same splits"
        )
    splits, width = tuple(questions), len(COLUMNS)
    rows, items = [], []
    unanswered = unasked = 0
    for index, split in enumerate(splits):
        paired, left_over = pair_answers(questions[split], answers[split])
        if not paired:
            raise DataError(f"POPE: {split}: no answer fits a question; check ids and files")
        unanswered, unasked = unanswered + len(questions[split]) - len(paired), unasked + left_over
        for question in questions[split]:
            if question.id in paired:
                row = np.zeros((len(splits), width))
                row[index] = _answer_stats(paired[question.id].text, question.label)
                rows.append(row.ravel())
                items.append(_item(split, question, paired[question.id]))
    stats = np.array(rows)
    return Scored(
        benchmark="pope",
        ids=tuple(item["id"] for item in items),
        units=tuple(image_name(item["image"]) for item in items),
        stats=stats,
        figures=PopeFigures(splits),
        groups=splits,
        items=tuple(items),
        badness=1 - stats.reshape(-1, len(splits), width).sum(1)[:, COLUMNS.index("correct")],
        counts={"questions_without_answer": unanswered, "answers_without_question": unasked},
    )


def _item(split: str, question: PopeRow, answer: Answer) -> Json:
    return {
        "id": f"{split}/{question.id}",
        "image": question.image,
        "question": question.text,
        "answer": answer.text,
        "label": "yes" if question.label else "no",
    }


def _answer_stats(text: str, label: bool) -> Stats:
    yes, strict = read_answer(text), read_strictly(text)
    said = strict is True
    official = (1, label, yes == label, yes, yes and label)
    return np.array([*official, strict == label, said, said and label, strict is None], np.float64)


@dataclass(frozen=True, slots=True)
class PopeFigures:
    """The figures of splits, in order of their columns; a class, so that it can be pickled."""

    splits: tuple[str, ...]

    def __call__(self, sums: Stats) -> dict[str, Stats]:
        """From sums (..., splits * columns) to figures by name."""
        shape = (len(self.splits), len(COLUMNS))
        columns = np.asarray(sums, np.float64).reshape(*np.shape(sums)[:-1], *shape)
        by_split = {s: pope_figures(columns[..., i, :]) for i, s in enumerate(self.splits)}
        names = by_split[self.splits[0]]
        means = {n: np.mean([by_split[s][n] for s in self.splits], axis=0) for n in names}
        return means | {f"{s}/{n}": v for s, part in by_split.items() for n, v in part.items()}


def pope_figures(sums: Stats) -> dict[str, Stats]:
    """Compute one split's figures from sums (..., 9) of ``COLUMNS``.

    precision = hits / said yes, recall = hits / true, F1 = 2 hits / (said yes + true), each 0
    without a denominator; accuracy and ratios are per question, NaN without any.
    """
    c = dict(zip(COLUMNS, np.moveaxis(np.asarray(sums, np.float64), -1, 0), strict=True))
    figures: dict[str, Stats] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for rule in ("", "strict_"):
            said, hits = c[f"{rule}said_yes"], c[f"{rule}hits"]
            figures |= {
                f"{rule}accuracy": c[f"{rule}correct"] / c["questions"],
                f"{rule}precision": np.where(said > 0, hits / said, 0.0),
                f"{rule}recall": np.where(c["true"] > 0, hits / c["true"], 0.0),
                f"{rule}f1": np.where(hits > 0, 2 * hits / (said + c["true"]), 0.0),
                f"{rule}yes_ratio": said / c["questions"],
            }
        figures["strict_unreadable"] = c["strict_unreadable"] / c["questions"]
    return figures
