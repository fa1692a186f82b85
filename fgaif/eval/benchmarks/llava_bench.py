"""LLaVA-Bench: a judge grades a model's answer against a reference answer (Liu et al., 2023).

COCO: 90 questions about 30 val2014 images, the context of the judge being captions and boxes. In
the wild: 60 questions about 24 images, the context being a caption. The relative score is
100 * mean(grade of the model) / mean(grade of the reference). A reply whose first line is not two
grades is asked again and then left out and counted; the official script averages it in as -1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fgaif.chat.messages import ChatModel, ChatRequest, load_prompt
from fgaif.errors import DataError
from fgaif.eval.benchmark import Benchmark, EvalContext, Judges, PreparedBenchmark, needed
from fgaif.eval.figures import Figure
from fgaif.eval.judge import (
    CONCURRENCY,
    PROMPTS,
    READS,
    Progress,
    failures,
    judge_all,
)
from fgaif.eval.llava_bench_files import (
    CATEGORIES,
    LlavaBenchItem,
    LlavaBenchItems,
    Rule,
    category_of,
    load_rules,
    read_bench,
    rows_by_key,
)
from fgaif.eval.questions import QuestionSet
from fgaif.eval.rows import Row
from fgaif.eval.scored import Scored, Stats, ratio
from fgaif.types import Json

_RELATIVE = "100 x mean grade / mean grade of the reference answers"
FIGURES = (
    Figure(key="all", title="relative score", meaning=_RELATIVE, better=1, share=False),
    Figure(key="conv", title="conversation", meaning=_RELATIVE, better=1, share=False),
    Figure(key="detail", title="detail", meaning=_RELATIVE, better=1, share=False),
    Figure(key="complex", title="complex reasoning", meaning=_RELATIVE, better=1, share=False),
    Figure(
        key="reference_grade",
        title="reference grade",
        meaning="Mean grade of the reference answers, 1 to 10",
        better=0,
        share=False,
    ),
    Figure(
        key="model_grade",
        title="model grade",
        meaning="Mean grade of the model's answers, 1 to 10",
        better=0,
        share=False,
    ),
)
_OFFICIAL = ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl", "caps_boxes_coco2014_val_80.jsonl")
_LOWEST, _HIGHEST = 1, 10
_TEMPERATURE = 0.2
_MAX_TOKENS = 1024

Grades = tuple[float, float]
"""Grades from 1 to 10 of the reference (Assistant 1) and of the model (Assistant 2)."""


def read_grades(reply: str) -> Grades | None:
    """Read the two grades, from 1 to 10, on the first line: by space or comma, nothing else."""
    parts = reply.strip().split("\n")[0].replace(",", " ").split()
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return None
    graded = all(_LOWEST <= grade <= _HIGHEST for grade in (first, second))
    return (first, second) if graded else None


async def score_llava_bench(
    bench: LlavaBenchItems,
    model: ChatModel,
    rules: Mapping[str, Rule],
    *,
    reads: int = READS,
    concurrency: int = CONCURRENCY,
    progress: Progress | None = None,
) -> Scored:
    """Judge the answers and score them.

    Figures: the relative scores ``conv``, ``detail``, ``complex`` and ``all``, and the mean grades
    ``reference_grade`` and ``model_grade`` (1 to 10). Counts: those of ``bench``,
    ``judge_unreadable``, ``judge_no_reply``; failed items are in no figure and not among the items.

    Raises:
        ServiceError: the judge cannot be asked at all.
        DataError: not one of its replies could be read.
    """
    system = load_prompt(PROMPTS / "llava_bench_system.txt", ())
    judgements = await judge_all(
        model,
        bench.items,
        partial(_request, rules, system.text),
        read_grades,
        reads=reads,
        concurrency=concurrency,
        progress=progress,
    )
    graded = [(i, j) for i, j in zip(bench.items, judgements, strict=True) if j.value is not None]
    if not graded:
        raise DataError(
            f"judge {model.name}: none of {len(judgements)} replies could be read, the last one "
            f"{judgements[-1].reply!r:.80}; ask another model, or give other rules"
        )
    versions = dict.fromkeys(rules[name].version for name in CATEGORIES)
    return _scored(
        [(item.id, item.image, item.category, j.value) for item, j in graded if j.value],
        items=[
            {
                "id": item.id,
                "image": item.image,
                "category": item.category,
                "question": item.question,
                "answer": item.answer,
                "reference": item.reference,
                "grades": list(j.value or ()),
                "judge": j.reply,
            }
            for item, j in graded
        ],
        counts={**bench.counts, **failures(judgements)},
        provenance={
            "judge": model.name,
            "prompt": ", ".join([*versions, system.version]),
            "set": "in the wild" if bench.in_the_wild else "coco",
        },
    )


def score_reviews(path: Path, questions: Path | None = None) -> Scored:
    """Score a review file of the official scripts, without asking anybody.

    Rows: ``question_id, category, content, tuple``. ``[-1, -1]`` and grades outside 1 to 10 are
    failed judgements: counted as ``judge_unreadable``, in no figure.

    Args:
        questions: the questions file, for the images; without it every question is its own unit.

    Raises:
        DataError: names row and key, or no review can be used.
    """
    images: dict[str, str] = {}
    if questions is not None:
        rows = rows_by_key(questions, "question_id")
        images = {identity: row.text("image") for identity, row in rows.items()}
    reviews = rows_by_key(path, "question_id")
    read = {identity: (row, _grades(row)) for identity, row in reviews.items()}
    graded = {i: (row, grades) for i, (row, grades) in read.items() if grades is not None}
    if not graded:
        raise DataError(f"{path}: key `tuple`: no review has two grades from 1 to 10")
    return _scored(
        [(i, images.get(i, i), category_of(row), grades) for i, (row, grades) in graded.items()],
        items=[
            {"id": i, "image": images.get(i), "category": category_of(row), "grades": list(grades)}
            | {"judge": row.data.get("content")}
            for i, (row, grades) in graded.items()
        ],
        counts={"judge_unreadable": len(read) - len(graded)},
        provenance={"judge": "reviews of a file"},
    )


def _scored(
    graded: Sequence[tuple[str, str, str, Grades]],
    *,
    items: Sequence[Json],
    counts: dict[str, int],
    provenance: dict[str, str],
) -> Scored:
    """Sum grades (id, image, category, grades): columns count, then reference and model grade of
    each category."""
    stats = np.zeros((len(graded), 1 + 2 * len(CATEGORIES)))
    stats[:, 0] = 1
    for row, (_, _, category, grades) in enumerate(graded):
        column = 1 + 2 * CATEGORIES.index(category)
        stats[row, column : column + 2] = grades
    return Scored(
        benchmark="llava-bench",
        ids=tuple(identity for identity, *_ in graded),
        units=tuple(image for _, image, *_ in graded),
        stats=stats,
        figures=llava_bench_figures,
        items=tuple(items),
        badness=np.array([grades[0] - grades[1] for *_, grades in graded]),
        counts=counts,
        provenance=provenance,
    )


def llava_bench_figures(sums: Stats) -> Mapping[str, Stats]:
    """Compute the figures from sums (..., 7): items, then reference and model grade by category."""
    reference, model = sums[..., 1::2], sums[..., 2::2]
    by_category = 100 * ratio(model, reference)
    total_reference, total_model = reference.sum(axis=-1), model.sum(axis=-1)
    return {
        **{name: by_category[..., column] for column, name in enumerate(CATEGORIES)},
        "all": 100 * ratio(total_model, total_reference),
        "reference_grade": ratio(total_reference, sums[..., 0]),
        "model_grade": ratio(total_model, sums[..., 0]),
    }


def _request(rules: Mapping[str, Rule], system: str, item: LlavaBenchItem) -> ChatRequest:
    rule = rules[item.category]
    parts = [
        f"[Context]\n{item.context}",
        f"[Question]\n{item.question}",
        f"[{rule.role} 1]\n{item.reference}",
        f"[End of {rule.role} 1]",
        f"[{rule.role} 2]\n{item.answer}",
        f"[End of {rule.role} 2]",
        f"[System]\n{rule.prompt}",
    ]
    return ChatRequest(
        prompt_version=rule.version,
        subject=f"{item.id}: {item.question}",
        text="\n\n".join(parts) + "\n\n",
        system=system,
        max_tokens=_MAX_TOKENS,
        temperature=_TEMPERATURE,
    )


def _grades(row: Row) -> Grades | None:
    pair = row.data.get("tuple")
    numbers = isinstance(pair, list) and all(isinstance(grade, int | float) for grade in pair)
    if not isinstance(pair, list) or not numbers or len(pair) != 2:
        raise row.wrong("tuple", pair, "a list of two grades")
    return read_grades(f"{pair[0]} {pair[1]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaBenchOptions:
    """Options of ``fgaif eval llava-bench``."""

    questions: Annotated[Path | None, typer.Option(help="Questions, JSONL.")] = None
    references: Annotated[Path | None, typer.Option(help="Reference answers, JSONL.")] = None
    contexts: Annotated[
        Path | None, typer.Option(help="Captions and boxes of the images, JSONL.")
    ] = None
    answers: Annotated[Path | None, typer.Option("--answers", help="Answers that exist.")] = None
    rules: Annotated[Path | None, typer.Option(help="rule.json instead of our rules.")] = None
    reviews: Annotated[
        Path | None, typer.Option(help="Official review file: score it and ask nobody.")
    ] = None
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of generated answers.")
    ] = 1024


def prepare_llava_bench(options: LlavaBenchOptions, context: EvalContext) -> PreparedBenchmark:
    """Make LLaVA-Bench ready to be judged; or the official reviews of a file, without a judge.

    Raises:
        ConfigError, DataError: an option or a file cannot be used; the message names it.
    """
    builder = context.builder_unless(options.answers or options.reviews)
    if options.reviews is not None:
        return _prepare_reviews(options.reviews, options.questions)
    question_file = needed(options.questions, "llava-bench", "--questions")
    reference_file = needed(options.references, "llava-bench", "--references")
    context_file = needed(options.contexts, "llava-bench", "--contexts")
    questions: tuple[QuestionSet, ...] = ()
    rows = rows_by_key(question_file, "question_id")
    if builder is not None:
        items = [(name, row.text("image"), row.text("text")) for name, row in rows.items()]
        questions = (builder.build("llava-bench", items, options.max_new_tokens),)
    answer_file = (
        questions[0].file if questions else needed(options.answers, "llava-bench", "--answers")
    )

    async def score(judges: Judges, progress: Progress) -> Scored:
        bench = read_bench(question_file, reference_file, context_file, answer_file)
        rules = load_rules(options.rules, bench.in_the_wild)
        return await score_llava_bench(bench, judges.needed_judge, rules, progress=progress)

    return PreparedBenchmark(
        benchmark="llava-bench",
        score=score,
        judged=True,
        questions=questions,
        files={
            "questions": question_file,
            "references": reference_file,
            "contexts": context_file,
            "answers": answer_file,
            **({"rules": options.rules} if options.rules else {}),
        },
        items=len(rows),
    )


def _prepare_reviews(reviews: Path, questions: Path | None) -> PreparedBenchmark:
    async def score(judges: Judges, progress: Progress) -> Scored:
        return score_reviews(reviews, questions)

    files = {"reviews": reviews} | ({"questions": questions} if questions else {})
    return PreparedBenchmark(benchmark="llava-bench", score=score, files=files)


def prepare_official(data: Path, context: EvalContext, count: int) -> PreparedBenchmark | Path:
    """Make the COCO set of a folder ready, or return the path that is not there."""
    paths = [data / name for name in _OFFICIAL]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        return missing
    questions, references, contexts = paths
    options = LlavaBenchOptions(questions=questions, references=references, contexts=contexts)
    return prepare_llava_bench(options, context)


BENCHMARK = Benchmark(
    name="llava-bench",
    title="LLaVA-Bench",
    summary="COCO or in the wild, grades of a judge relative to reference answers",
    answers="--answers, or --reviews without a judge",
    truth="--questions --references --contexts [--rules]",
    options=LlavaBenchOptions,
    prepare=prepare_llava_bench,
    figures=FIGURES,
    compute=lambda groups: llava_bench_figures,
    models=("judge",),
    official=prepare_official,
)
