"""POPE: does the model say that absent objects are there? (Li et al., 2023)

One and the same for official files, whose answers are texts, and for the embedded world, whose
policy gives a probability of yes: ``pope_figures`` computes both from the same counts. Questions
are drawn in ``fgaif.eval.pope_questions``.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fgaif.errors import ConfigError, DataError
from fgaif.eval.answers import AnswerRow, image_name, read_answers
from fgaif.eval.benchmark import Benchmark, EvalContext, Judges, PreparedBenchmark
from fgaif.eval.checks import MANY_DISAGREE, MANY_UNREAD, warned
from fgaif.eval.figures import Figure
from fgaif.eval.judge import Progress
from fgaif.eval.pope_questions import STRATEGIES, read_questions
from fgaif.eval.pope_splits import is_question_list, read_question_list, split_answers
from fgaif.eval.questions import QuestionSet
from fgaif.eval.scored import Scored, Stats
from fgaif.eval.yes_no import (
    YesNoQuestion,
    pair_answers,
    read_strictly,
    without_echo,
    yes_no_figures,
)
from fgaif.types import Json, PopeMetrics

log = logging.getLogger(__name__)

SUFFIX = "\nAnswer the question using a single word or phrase."
"""What the official evaluation adds to each question."""
COLUMNS = (
    "questions", "true", "correct", "said_yes", "hits",
    "strict_correct", "strict_said_yes", "strict_hits", "strict_unreadable",
)  # fmt: skip
FIGURES = (
    Figure(key="accuracy", title="accuracy", meaning="Questions answered right", better=1),
    Figure(key="precision", title="precision", meaning="Yes answers that are right", better=1),
    Figure(key="recall", title="recall", meaning="Objects there that are confirmed", better=1),
    Figure(key="f1", title="F1", meaning="Harmonic mean of precision and recall", better=1),
    Figure(
        key="yes_ratio",
        title="yes ratio",
        meaning="Questions answered yes; half of the right answers are",
        better=0,
    ),
    Figure(
        key="strict_unreadable",
        title="unreadable",
        meaning="Answers that begin with neither yes nor no",
        better=-1,
    ),
)


def read_answer(text: str) -> bool:
    """Read a free answer by the official rule, to the letter: of the words between blanks before
    the first full stop, commas dropped, "No", "not" or "no" means no; anything else means yes."""
    return not {"No", "not", "no"} & set(text.split(".")[0].replace(",", "").split(" "))


def score_pope(
    questions: Mapping[str, Sequence[YesNoQuestion]], answers: Mapping[str, Sequence[AnswerRow]]
) -> Scored:
    """Score answers, both given by split.

    Figures: ``accuracy``, ``precision``, ``recall``, ``f1`` and ``yes_ratio`` by the official rule,
    the same with ``strict_`` by the first word (after the question, where an answer repeats that),
    and ``strict_unreadable``, the share of answers that begin with neither yes nor no (wrong by the
    strict rule, and not a yes); of each split as
    ``SPLIT/accuracy`` and so on, and as ``accuracy`` the plain mean over the splits. Precision,
    recall and F1 are 0 where nothing is to divide by.

    Questions without an answer are left out and counted, as are answers without a question.
    Answers that the two rules read differently are counted (``rules_disagree``), and warned about
    above one in a hundred.

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
    disagree: list[AnswerRow] = []
    accidental: list[str] = []
    for index, split in enumerate(splits):
        paired, left_over = pair_answers(questions[split], answers[split])
        if not paired:
            raise DataError(f"POPE: {split}: no answer fits a question; check ids and files")
        if left_over and all(a.question is None and a.image is None for a in answers[split]):
            accidental.append(
                f"POPE: {split}: {left_over} of {len(answers[split])} answers fit no question, and "
                "none says what it answers: if their ids count over several splits, they may "
                "answer other questions than these; give the questions of all splits"
            )
        unanswered, unasked = unanswered + len(questions[split]) - len(paired), unasked + left_over
        for question in questions[split]:
            if question.id in paired:
                row = np.zeros((len(splits), width))
                found = paired[question.id]
                strict = read_strictly(without_echo(found.text, question.text))
                official = read_answer(found.text)
                if strict is not None and strict != official:
                    disagree.append(found)
                row[index] = answer_stats(official, strict, question.label)
                rows.append(row.ravel())
                items.append(_item(split, question, found))
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
        counts={
            "questions_without_answer": unanswered,
            "answers_without_question": unasked,
            "rules_disagree": len(disagree),
        },
        warnings=warned(log, accidental, _reading_checks(disagree, stats.reshape(-1, width))),
    )


def _item(split: str, question: YesNoQuestion, answer: AnswerRow) -> Json:
    return {
        "id": f"{split}/{question.id}",
        "image": question.image,
        "question": question.text,
        "answer": answer.text,
        "label": "yes" if question.label else "no",
    }


def _reading_checks(disagree: Sequence[AnswerRow], stats: Stats) -> list[str]:
    """Say where the headline figures may not be what the answers say."""
    sums = stats.sum(axis=0)
    total, unread = (int(sums[COLUMNS.index(name)]) for name in ("questions", "strict_unreadable"))
    found = []
    if len(disagree) > MANY_DISAGREE * total:
        example = disagree[0]
        found.append(
            f"POPE: official and strict rule disagree on {len(disagree)} of {total} answers, as "
            f"{example.where}: {example.text!r:.80}, which the official rule reads as "
            f"{'yes' if read_answer(example.text) else 'no'}; accuracy, precision, recall and F1 "
            "follow the official rule: see strict_accuracy and so on, or take stop marks and what "
            "follows the answer out of the file"
        )
    if unread > MANY_UNREAD * total:
        found.append(
            f"POPE: {unread} of {total} answers begin with neither yes nor no; the official rule "
            "takes them for yes unless it finds a no, the strict rule counts them as wrong"
        )
    return found


def answer_stats(yes: bool, strict: bool | None, label: bool) -> Stats:
    """What one answer adds to ``COLUMNS``: as the official and as the strict rule read it."""
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
    """Compute one split's figures (``yes_no_figures``) by both rules from sums (..., 9) of
    ``COLUMNS``, and ``strict_unreadable`` per question."""
    c = dict(zip(COLUMNS, np.moveaxis(np.asarray(sums, np.float64), -1, 0), strict=True))
    figures: dict[str, Stats] = {}
    for rule in ("", "strict_"):
        by_rule = yes_no_figures(
            questions=c["questions"],
            true=c["true"],
            correct=c[f"{rule}correct"],
            said=c[f"{rule}said_yes"],
            hits=c[f"{rule}hits"],
        )
        figures |= {f"{rule}{name}": value for name, value in by_rule.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        figures["strict_unreadable"] = c["strict_unreadable"] / c["questions"]
    return figures


def pope_metrics(answers: Sequence[bool], labels: Sequence[bool]) -> PopeMetrics:
    """Score answers against labels, True meaning yes; a figure without a denominator is 0.

    Raises:
        DataError: no answers, or another number of answers than of labels.
    """
    if not answers or len(answers) != len(labels):
        raise DataError(f"POPE: {len(answers)} answers for {len(labels)} questions")
    said, true = np.array(answers, bool), np.array(labels, bool)
    flags = {
        "questions": np.ones(len(said), bool),
        "true": true,
        "correct": said == true,
        "said": said,
        "hits": said & true,
    }
    counts = {name: np.asarray(np.count_nonzero(f), np.float64) for name, f in flags.items()}
    figures = yes_no_figures(**counts)
    return PopeMetrics(**{name: float(value) for name, value in figures.items()})


def mean_metrics(parts: Sequence[PopeMetrics]) -> PopeMetrics:
    """Average the strategies with equal weight, as published tables do."""
    names = [field.name for field in fields(PopeMetrics)]
    return PopeMetrics(**{n: sum(getattr(p, n) for p in parts) / len(parts) for n in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class PopeOptions:
    """Options of ``fgaif eval pope``."""

    questions: Annotated[
        list[str] | None,
        typer.Option(metavar="[SPLIT=]FILE", help="Official JSONL; repeat it for more splits."),
    ] = None
    answers: Annotated[
        list[str] | None,
        typer.Option(metavar="[SPLIT=]FILE", help="model_vqa's or POPE's own form."),
    ] = None
    suffix: Annotated[str, typer.Option(help="Added to each question for --model.")] = SUFFIX
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of generated answers.")
    ] = 64


def prepare_pope(options: PopeOptions, context: EvalContext) -> PreparedBenchmark:
    """Make POPE ready over one or more splits, each with a questions and an answers file, or with
    one file of answers to all of them (see ``fgaif.eval.pope_splits``).

    Raises:
        ConfigError, DataError: an option or a file cannot be used; the message names it.
    """
    if not options.questions:
        raise ConfigError("fgaif eval pope needs --questions; `fgaif eval build-pope` makes some")
    builder = context.builder_unless(options.answers)
    question_files = named_splits(options.questions, "--questions")
    lists = [split for split, path in question_files.items() if is_question_list(path)]
    list_files = {split: question_files.pop(split) for split in lists}
    if list_files and (builder or not question_files or len(list_files) > 1):
        raise DataError(
            f"{next(iter(list_files.values()))}: holds no labels; give the questions of each split "
            "with their labels (coco_pope_SPLIT.jsonl) as --questions, and beside them at most one "
            "list of questions for answers to all splits"
        )
    answer_files = {} if builder else named_splits(options.answers or [], "--answers")
    whole_list = next(iter(list_files.values()), None)
    listed = read_question_list(whole_list) if whole_list else None
    whole = len(answer_files) == 1 and (
        listed is not None or (len(question_files) > 1 and not question_files.keys() & answer_files)
    )
    if builder is None and not whole:
        answer_files = paired_splits(question_files, answer_files)
    rows = {split: read_questions(path) for split, path in question_files.items()}
    questions: tuple[QuestionSet, ...] = ()
    if builder is not None:
        questions = tuple(
            builder.build(
                f"pope_{split}",
                [(row.id, row.image, row.text) for row in part],
                options.max_new_tokens,
                options.suffix,
            )
            for split, part in rows.items()
        )
        answer_files = {split: made.file for split, made in zip(rows, questions, strict=True)}

    async def score(judges: Judges, progress: Progress) -> Scored:
        answers = {split: read_answers(path) for split, path in answer_files.items()}
        if whole:
            answers = split_answers(rows, next(iter(answers.values())), listed)
        return score_pope(rows, answers)

    return PreparedBenchmark(
        benchmark="pope",
        score=score,
        questions=questions,
        files={
            **{f"questions {split}": path for split, path in question_files.items()},
            **({"question list": whole_list} if whole_list else {}),
            **{f"answers {split}": path for split, path in answer_files.items()},
        },
        items=sum(len(part) for part in rows.values()),
    )


def named_splits(values: Sequence[str], option: str) -> dict[str, Path]:
    """Read ``FILE`` or ``SPLIT=FILE``; a plain file's split is in its name, else the name itself.

    Raises:
        ConfigError: two files of one split.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, separator, rest = value.partition("=")
        path = Path(rest if separator else value)
        if not separator:
            name = next((split for split in STRATEGIES if split in path.stem.lower()), path.stem)
        if name in found:
            raise ConfigError(
                f"{option} {value}: the split {name!r} was given before ({found[name]}); name "
                f"splits with {option} SPLIT=FILE"
            )
        found[name] = path
    return found


def paired_splits(asked: Mapping[str, Path], answered: Mapping[str, Path]) -> dict[str, Path]:
    """Answers by the splits of the questions: by name, or one file for one.

    Raises:
        ConfigError: a split without its other file.
    """
    if len(asked) == len(answered) == 1:
        return dict(zip(asked, answered.values(), strict=True))
    if asked and not answered:
        raise ConfigError(
            "--questions alone leave nothing to score: give --answers FILE, or --model CHECKPOINT "
            "with --images and --out to generate them"
        )
    if asked.keys() != answered.keys():
        raise ConfigError(
            f"--questions are of {', '.join(asked) or 'no split'}, --answers of "
            f"{', '.join(answered) or 'no split'}; name them with --answers SPLIT=FILE"
        )
    return {split: answered[split] for split in asked}


def prepare_official(data: Path, context: EvalContext, count: int) -> PreparedBenchmark | Path:
    """Make the three splits of a folder ready, or return the path that is not there."""
    files = {split: data / f"coco_pope_{split}.jsonl" for split in STRATEGIES}
    missing = next((path for path in files.values() if not path.is_file()), None)
    if missing is not None:
        return missing
    questions = [f"{split}={path}" for split, path in files.items()]
    return prepare_pope(PopeOptions(questions=questions), context)


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    summary="yes/no questions about objects",
    answers="--answers",
    truth="--questions",
    options=PopeOptions,
    prepare=prepare_pope,
    figures=FIGURES,
    compute=PopeFigures,
    official=prepare_official,
)
