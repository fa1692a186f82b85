"""HallusionBench: the same question about an original and an edited figure (Guan et al., 2024).

Counted as in the official scripts (tianyi-lab/HallusionBench, ``utils.py``), but with a rule in
place of GPT-4 to say whether an answer is yes, no or neither.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fgaif.errors import DataError
from fgaif.eval.benchmark import Benchmark, EvalContext, Judges, PreparedBenchmark, needed
from fgaif.eval.benchmarks.pope import SUFFIX
from fgaif.eval.checks import MANY_UNREAD, warned
from fgaif.eval.figures import Figure
from fgaif.eval.judge import Progress
from fgaif.eval.questions import QuestionSet
from fgaif.eval.rows import Row, read_rows, warn_of_repeats
from fgaif.eval.scored import Scored, Stats, ratio
from fgaif.eval.yes_no import read_strictly
from fgaif.types import Json

log = logging.getLogger(__name__)

CATEGORIES = ("VD", "VS")
PARTS = ("all", "easy", "hard")
COLUMNS = (
    *(f"{p}_{what}" for p in PARTS for what in ("questions", "right", "pairs", "pairs_right")),
    "figures", "figures_right", "true_yes", "said_yes", "wrong_no", "unreadable",
)  # fmt: skip
_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id")
_NO_FIGURE, _EDITED = "0", "2"
FIGURES = (
    Figure(key="aacc", title="aAcc", meaning="Questions answered right", better=1),
    Figure(
        key="qacc",
        title="qAcc",
        meaning="Questions answered right about every figure of their set",
        better=1,
    ),
    Figure(key="facc", title="fAcc", meaning="Figures with all answers right", better=1),
    Figure(
        key="yes_bias",
        title="yes bias",
        meaning="Questions answered yes less those whose answer is yes; 0 is best",
        better=0,
    ),
    Figure(
        key="fp_ratio",
        title="false yes",
        meaning="Wrong answers to questions whose answer is no; half without a bias",
        better=0,
    ),
    Figure(
        key="unreadable",
        title="unreadable",
        meaning="Answers that say neither yes nor no",
        better=0,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HallusionQuestion:
    """A question. ``figure`` is 0 for the original, or for no figure (``visual`` 0) of a question
    that can be answered without; ``visual`` is 2 for an edited figure. ``file`` is the image."""

    where: str
    category: str
    set_name: str
    figure: str
    question: str
    visual: str
    text: str
    yes: bool
    file: str | None

    @property
    def id(self) -> str:
        """Category, subcategory, set, figure and question, as the official scripts join them."""
        return f"{self.set_name}_{self.figure}_{self.question}"


def read_answer(text: str) -> bool | None:
    """Read yes (True) or no from an answer, or None.

    By its first word, else by the one of the two words that occurs in it; "1" and "0" stand for
    themselves.
    """
    bare = text.strip()
    if bare in ("0", "1"):
        return bare == "1"
    first = read_strictly(text)
    words = {"yes", "no"} & set(re.findall(r"\w+", text.lower()))
    return first if first is not None or len(words) != 1 else words == {"yes"}


def score_hallusion(questions: Sequence[HallusionQuestion], answers: Mapping[str, str]) -> Scored:
    """Score answers by question id; an item is a set, with all its figures and questions.

    Right is the right word, and without a figure also an answer that says neither, as the official
    scripts have it. Questions without an answer are left out and counted.

    Raises:
        DataError: no answer is to one of the questions.
    """
    asked = [question for question in questions if question.id in answers]
    if not asked:
        raise DataError(
            f"HallusionBench: no answer is to one of the questions ({next(iter(answers), '-')}); "
            "answers repeat category, subcategory, set_id, figure_id and question_id"
        )
    sets: dict[str, list[HallusionQuestion]] = {}
    for question in asked:
        sets.setdefault(question.set_name, []).append(question)
    stats, items = [], []
    for name, own in sets.items():
        row, item = _set_stats(own, answers)
        stats.append(row)
        items.append({"id": name, "image": own[-1].file or "", **item})
    array = np.array(stats)
    sums = dict(zip(COLUMNS, array.reshape(-1, 2, len(COLUMNS)).sum((0, 1)), strict=True))
    return Scored(
        benchmark="hallusion",
        ids=tuple(sets),
        units=tuple(sets),
        stats=array,
        figures=hallusion_figures,
        items=tuple(items),
        badness=np.array([len(item["wrong"]) for item in items], np.float64),
        counts={
            "questions_without_answer": len(questions) - len(asked),
            "answers_without_question": len(answers) - len(asked),
        },
        warnings=warned(log, _checks(questions, asked, sums)),
    )


def _set_stats(
    questions: Sequence[HallusionQuestion], answers: Mapping[str, str]
) -> tuple[Stats, Json]:
    """Sums of one set in its category's columns, the other's 0, and what people see of it."""
    row = dict.fromkeys(COLUMNS, 0.0)
    right: dict[str, bool] = {}
    for q in questions:
        said = read_answer(answers[q.id])
        right[q.id] = said == q.yes or (said is None and _without_figure(q))
        row["true_yes"] += q.yes
        row["said_yes"] += right[q.id] == q.yes  # as the official script counts a yes
        row["wrong_no"] += not right[q.id] and not q.yes
        row["unreadable"] += said is None
    for part in PARTS:
        own = [q for q in questions if part == "all" or (q.visual == _EDITED) == (part == "hard")]
        row[f"{part}_questions"], row[f"{part}_right"] = len(own), sum(right[q.id] for q in own)
        row[f"{part}_pairs"], row[f"{part}_pairs_right"] = _all_right(
            [(q.question, right[q.id]) for q in own]
        )
    row["figures"], row["figures_right"] = _all_right(
        [(q.figure, right[q.id]) for q in questions if not _without_figure(q)]
    )
    place = CATEGORIES.index(questions[0].category) * len(COLUMNS)
    stats = np.zeros(len(CATEGORIES) * len(COLUMNS))
    stats[place : place + len(COLUMNS)] = list(row.values())
    shown = [f"{q.id}: {q.text} {answers[q.id]}" for q in questions if not right[q.id]]
    return stats, {"wrong": shown, "right": sum(right.values())}


def _without_figure(question: HallusionQuestion) -> bool:
    return question.category == "VS" and question.figure == _NO_FIGURE


def _all_right(answers: Sequence[tuple[str, bool]]) -> tuple[int, int]:
    """Number of groups, and of those in which every answer is right."""
    groups: dict[str, bool] = {}
    for name, right in answers:
        groups[name] = groups.get(name, True) and right
    return len(groups), sum(groups.values())


def _checks(
    questions: Sequence[HallusionQuestion],
    asked: Sequence[HallusionQuestion],
    sums: Mapping[str, float],
) -> list[str]:
    missing = [question for question in questions if question not in set(asked)]
    found = []
    if missing and all(question.file is None for question in missing):
        found.append(
            f"HallusionBench: the {len(missing)} questions without a figure are not answered; the "
            "figures are over the images, as VLMEvalKit's, not over the official 1,129 questions"
        )
    elif missing:
        found.append(
            f"HallusionBench: {len(missing)} of {len(questions)} questions are not answered, and "
            "qAcc and fAcc are over those that are; published figures are over all"
        )
    if sums["unreadable"] > MANY_UNREAD * len(asked):
        found.append(
            f"HallusionBench: {int(sums['unreadable'])} of {len(asked)} answers say neither yes "
            "nor no; they are wrong, or right without a figure. Ask for yes or no"
        )
    return found


def hallusion_figures(sums: Stats) -> dict[str, Stats]:
    """Compute the figures from sums (..., 2 * 18): ``COLUMNS`` of VD, then of VS.

    ``easy`` are questions about no or the original figure, ``hard`` those about an edited one;
    their qAcc is what the official table calls accuracy per easy and hard question.
    """
    columns = np.asarray(sums, np.float64).reshape(*np.shape(sums)[:-1], 2, len(COLUMNS))
    parts = {"": columns.sum(-2), **{f"{c}/": columns[..., i, :] for i, c in enumerate(CATEGORIES)}}
    figures: dict[str, Stats] = {}
    for name, part in parts.items():
        c = dict(zip(COLUMNS, np.moveaxis(part, -1, 0), strict=True))
        questions = c["all_questions"]
        figures |= {
            f"{name}aacc": ratio(c["all_right"], questions),
            f"{name}qacc": ratio(c["all_pairs_right"], c["all_pairs"]),
            f"{name}facc": ratio(c["figures_right"], c["figures"]),
            f"{name}yes_bias": ratio(c["said_yes"] - c["true_yes"], questions),
            f"{name}fp_ratio": ratio(c["wrong_no"], questions - c["all_right"]),
            f"{name}unreadable": ratio(c["unreadable"], questions),
        }
        for level in PARTS[1:]:
            figures |= {
                f"{name}{level}/aacc": ratio(c[f"{level}_right"], c[f"{level}_questions"]),
                f"{name}{level}/qacc": ratio(c[f"{level}_pairs_right"], c[f"{level}_pairs"]),
            }
    return figures


def read_hallusion_questions(path: Path) -> list[HallusionQuestion]:
    """Read ``HallusionBench.json``.

    Raises:
        DataError: the file or a row cannot be used (names row and key), or a question comes twice.
    """
    found: dict[str, HallusionQuestion] = {}
    for row in read_rows(path):
        category, subcategory, set_id, figure, question = (row.identity(key) for key in _KEYS)
        if category not in CATEGORIES:
            raise row.wrong("category", category, "VD or VS")
        truth = row.identity("gt_answer")
        if truth not in ("0", "1"):
            raise row.wrong("gt_answer", truth, "0 (no) or 1 (yes)")
        one = HallusionQuestion(
            where=row.where,
            category=category,
            set_name=f"{category}_{subcategory}_{set_id}",
            figure=figure,
            question=question,
            visual=row.identity("visual_input"),
            text=row.text("question"),
            yes=truth == "1",
            file=row.shown("filename").removeprefix("./") or None,
        )
        if found.setdefault(one.id, one) is not one:
            raise DataError(f"{row.where}: the question of {found[one.id].where} again; keep one")
    return list(found.values())


def read_hallusion_answers(path: Path) -> dict[str, str]:
    """Read answers by question id: official rows with ``model_prediction``, or model_vqa's.

    Raises:
        DataError: the file or a row cannot be used, or two answers to one question differ.
    """
    found: dict[str, str] = {}
    repeated = 0
    for row in read_rows(path):
        identity = _identity(row)
        text = row.text("model_prediction", "text", "answer", "response", empty=True)
        if identity in found and found[identity] != text:
            raise DataError(f"{row.where}: another answer to {identity} is there; keep one")
        repeated += identity in found
        found[identity] = text
    warn_of_repeats(str(path), repeated)
    return found


def _identity(row: Row) -> str:
    if "category" in row.data:
        return "_".join(row.identity(key) for key in _KEYS)
    return row.identity("question_id", "id")


@dataclass(frozen=True, slots=True, kw_only=True)
class HallusionOptions:
    """Options of ``fgaif eval hallusion``."""

    questions: Annotated[Path | None, typer.Option(help="The official HallusionBench.json.")] = None
    answers: Annotated[
        Path | None,
        typer.Option(help="Official rows with model_prediction, or model_vqa's form."),
    ] = None
    suffix: Annotated[str, typer.Option(help="Added to each question for --model.")] = SUFFIX
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of generated answers.")
    ] = 64


def prepare_hallusion(options: HallusionOptions, context: EvalContext) -> PreparedBenchmark:
    """Make HallusionBench ready; ``--model`` is asked the questions that have an image.

    Raises:
        ConfigError, DataError: an option or a file cannot be used; the message names it.
    """
    file = needed(options.questions, "hallusion", "--questions")
    builder = context.builder_unless(options.answers)
    questions = read_hallusion_questions(file)
    sets: tuple[QuestionSet, ...] = ()
    if builder is not None:
        rows = [(q.id, file, q.text) for q, file in _with_image(questions, builder.images)]
        sets = (builder.build("hallusion", rows, options.max_new_tokens, options.suffix),)
    answers = sets[0].file if sets else needed(options.answers, "hallusion", "--answers")

    async def score(judges: Judges, progress: Progress) -> Scored:
        return score_hallusion(questions, read_hallusion_answers(answers))

    return PreparedBenchmark(
        benchmark="hallusion",
        score=score,
        questions=sets,
        files={"questions": file, "answers": answers},
        items=len(questions),
    )


def _with_image(
    questions: Sequence[HallusionQuestion], folder: Path
) -> list[tuple[HallusionQuestion, str]]:
    """Questions whose image lies where its path says; by name alone, ``0_1.png`` is many images."""
    shown = [(question, question.file) for question in questions if question.file is not None]
    found = [(question, file) for question, file in shown if (folder / file).is_file()]
    if not found:
        raise DataError(
            f"{folder}: holds no {shown[0][1] if shown else 'image'}; give the folder that the "
            "paths of the questions start from"
        )
    if len(found) < len(shown):
        log.warning(
            "HallusionBench: %d of %d questions are left out, %s does not hold their image",
            len(shown) - len(found),
            len(shown),
            folder,
        )
    return found


def prepare_official(data: Path, context: EvalContext, count: int) -> PreparedBenchmark | Path:
    """Make the benchmark ready from ``hallusion/HallusionBench.json``, or return that path."""
    file = data / "hallusion" / "HallusionBench.json"
    return prepare_hallusion(HallusionOptions(questions=file), context) if file.is_file() else file


BENCHMARK = Benchmark(
    name="hallusion",
    title="HallusionBench",
    summary="the same yes/no question about original and edited figures",
    answers="--answers",
    truth="--questions",
    options=HallusionOptions,
    prepare=prepare_hallusion,
    figures=FIGURES,
    compute=lambda groups: hallusion_figures,
    nested=True,
    official=prepare_official,
)
