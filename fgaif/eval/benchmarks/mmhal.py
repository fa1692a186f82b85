"""MMHal-Bench: 96 questions that tempt to hallucinate, rated 0 to 6 by a judge (Sun et al., 2023).

The response file is a JSON list of items with ``question_type``, ``image_id``, ``image_content``,
``question``, ``gt_answer`` and ``model_answer``. Two things differ from the official scorer on
purpose: an item's type is its own ``question_type``, not its place in the file, and a reply without
exactly one rating is asked again and then left out and counted, not scored 0. ``official_score``
and ``official_hallucination_rate`` are what its rule gives, with 0 for such items.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
import typer

from fgaif.chat.messages import ChatModel, ChatRequest, PromptFile, load_prompt
from fgaif.errors import DataError
from fgaif.eval.benchmark import Benchmark, EvalContext, Judges, PreparedBenchmark, needed
from fgaif.eval.figures import Figure
from fgaif.eval.judge import CONCURRENCY, PROMPTS, READS, Judgement, Progress, failures, judge_all
from fgaif.eval.questions import QuestionSet
from fgaif.eval.rows import Row, read_rows, warn_of_repeats
from fgaif.eval.scored import FigureFunction, Scored, Stats, ratio
from fgaif.types import Json

log = logging.getLogger(__name__)

SIZE = 96
TYPES = (
    "attribute",
    "adversarial",
    "comparison",
    "counting",
    "relation",
    "environment",
    "holistic",
    "other",
)
SLOTS = ("image_content", "question", "standard_answer", "model_answer")
"""Slots of a judge prompt file, each once as ``{slot}``."""

PROMPT = PROMPTS / "mmhal.txt"
FIGURES = (
    Figure(key="score", title="score", meaning="Mean rating, 0 to 6", better=1, share=False),
    Figure(
        key="hallucination_rate",
        title="hallucination rate",
        meaning="Answers that the judge rates below 3",
        better=-1,
    ),
    Figure(key="length", title="length", meaning="Words per answer", better=0, share=False),
)
_MAX_TOKENS = 1024
_RATING = re.compile(r"rating: ([0-9]+(?:\.[0-9]+)?)")
_PER_TYPE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MmhalItem:
    """One question. ``index`` is its place in the file, from 0; ``image`` the image's file name."""

    index: int
    type: str
    image_id: str
    image: str
    contents: tuple[str, ...]
    question: str
    standard_answer: str
    answer: str | None = None

    @property
    def id(self) -> str:
        """Image and question, the same in every response file."""
        return f"{self.image_id}: {self.question}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MmhalItems:
    """Distinct items in order of the file, and what is noteworthy about them, by reason."""

    items: tuple[MmhalItem, ...]
    counts: dict[str, int]


def read_items(path: Path, *, answered: bool = True) -> MmhalItems:
    """Read a response file, or the template.

    Of an item that is there twice the first counts. Counts: ``items_missing`` of the 96,
    ``items_twice``, ``answers_empty`` (these are judged, like any other answer).

    Args:
        answered: take the answers under ``model_answer``; False leaves them alone.

    Raises:
        DataError: names item and key; or no item has an answer.
    """
    rows = read_rows(path)
    found = [_item(index, row, answered) for index, row in enumerate(rows)]
    items = list({item.id: item for item in reversed(found)}.values())[::-1]
    counts = {
        "items_missing": max(0, SIZE - len(items)),
        "items_twice": len(found) - len(items),
        "answers_empty": sum(item.answer is not None and not item.answer.strip() for item in items),
    }
    if answered and counts["answers_empty"] == len(items):
        raise DataError(
            f"{path}: key `model_answer`: empty in every item; put the answers there, or give them "
            "in a file of their own"
        )
    for reason, count in counts.items():
        if count:
            log.warning("%s: MMHal-Bench: %d %s", path, count, reason.replace("_", " "))
    return MmhalItems(items=tuple(items), counts=counts)


def with_answers(bench: MmhalItems, path: Path) -> MmhalItems:
    """Take the answers from a JSONL file, one object per answer, in any order.

    A row names its item by ``question_id`` (the item's place in the response file, from 0, or its
    ``image_id``), else by ``image_id`` and, if there, ``question``. Its answer is ``text`` (as
    ``model_vqa`` writes it) or ``model_answer``; the same answer again counts once. Items without
    an answer are left out; counts: ``items_unanswered``, ``answers_unmatched``.

    Raises:
        DataError: names row and key; an item is answered twice, the row's ``prompt`` or
            ``question`` is not the item's question, or no row matches.
    """
    rows = read_rows(path)
    _check_numbering(path, rows, len(bench.items))
    named = _names(bench.items)
    answers: dict[str, tuple[str, Row]] = {}
    unmatched = repeated = 0
    for row in rows:
        item = named.get(_name(row))
        if item is None:
            unmatched += 1
            continue
        _check_question(item, row)
        if item.id in answers:
            text, first = answers[item.id]
            if text == row.text("text", "model_answer", empty=True):
                repeated += 1
                continue
            raise DataError(
                f"{row.where}: answers the same item as {first.where}; keep one of the two"
            )
        answers[item.id] = row.text("text", "model_answer", empty=True), row
    warn_of_repeats(str(path), repeated)
    if not answers:
        raise DataError(f"{path}: no row matches an item; give `question_id` or `image_id`")
    items = tuple(replace(i, answer=answers[i.id][0]) for i in bench.items if i.id in answers)
    counts = {
        **bench.counts,
        "answers_empty": sum(not text.strip() for text, _ in answers.values()),
        "items_unanswered": len(bench.items) - len(items),
        "answers_unmatched": unmatched,
    }
    return MmhalItems(items=items, counts=counts)


def read_rating(reply: str) -> int | None:
    """Read a reply in which exactly one of "rating: 0" to "rating: 6" occurs, in any case.

    None for any other. The official script reads the first digit alone, "rating: 3.5" as 3 and
    "rating: 10" as 1; here both are no rating.
    """
    found = {float(number) for number in _RATING.findall(reply.lower().replace(",", "."))}
    rating = found.pop() if len(found) == 1 else math.nan
    return int(rating) if rating in range(7) else None


def load_judge_prompt(path: Path = PROMPT) -> PromptFile:
    """Read a judge prompt with the slots ``SLOTS``.

    Raises:
        ConfigError: the file cannot be read or a slot is not there exactly once.
    """
    return load_prompt(path, SLOTS)


async def score_mmhal(
    bench: MmhalItems,
    model: ChatModel,
    prompt: PromptFile,
    *,
    reads: int = READS,
    concurrency: int = CONCURRENCY,
    progress: Progress | None = None,
) -> Scored:
    """Judge the answers and score them.

    Figures: ``score`` (mean rating) and ``hallucination_rate`` (share of ratings below 3) over the
    judged items, both also as ``type/NAME/...``; ``official_score`` and
    ``official_hallucination_rate`` over all answers, a failed judgement being 0. Counts: those of
    ``bench``, ``judge_unreadable``, ``judge_no_reply``.

    Raises:
        ServiceError: the judge cannot be asked at all.
    """
    items = [item for item in bench.items if item.answer is not None]
    judgements = await judge_all(
        model,
        items,
        partial(_request, prompt),
        read_rating,
        reads=reads,
        concurrency=concurrency,
        progress=progress,
    )
    present = Counter(item.type for item in items)
    types = sorted(present, key=lambda t: (TYPES.index(t) if t in TYPES else len(TYPES), t))
    pairs = list(zip(items, judgements, strict=True))
    return Scored(
        benchmark="mmhal",
        ids=tuple(item.id for item in items),
        units=tuple(item.image_id for item in items),
        stats=np.array(
            [[*_stats(item, j.value, types), _words(item)] for item, j in pairs]
        ).reshape(len(items), -1),
        figures=mmhal_figures(types),
        groups=tuple(types),
        items=tuple(_shown(item, j) for item, j in pairs),
        badness=np.array([-1.0 if j.value is None else 6.0 - j.value for _, j in pairs]),
        counts={**bench.counts, **failures(judgements)},
        provenance={"judge": model.name, "prompt": prompt.version},
    )


def _item(index: int, row: Row, answered: bool) -> MmhalItem:
    image_id = row.identity("image_id")
    named = row.data.get("image_path") or row.data.get("image_src")
    return MmhalItem(
        index=index,
        type=row.text("question_type"),
        image_id=image_id,
        image=PurePosixPath(named).name if isinstance(named, str) else image_id,
        contents=tuple(row.texts("image_content")),
        question=row.text("question"),
        standard_answer=row.text("gt_answer"),
        answer=row.text("model_answer", empty=True) if answered else None,
    )


def _names(items: Sequence[MmhalItem]) -> dict[str, MmhalItem]:
    """Items by all that a row of answers may call them; an image's name beats a number."""
    named = {str(item.index): item for item in items}
    named.update((item.image_id, item) for item in items)
    named.update((item.id, item) for item in items)
    return named


def _name(row: Row) -> str:
    name = row.identity("question_id", "image_id")
    if "question_id" not in row.data and "question" in row.data:
        return f"{name}: {row.text('question')}"
    return name


def _check_numbering(path: Path, rows: Sequence[Row], size: int) -> None:
    numbers = {str(row.data.get("question_id")) for row in rows}
    if str(size) in numbers and "0" not in numbers:
        raise DataError(
            f"{path}: key `question_id` seems to count from 1; number items from 0, in the order "
            "of the response file, or use `image_id`"
        )


def _check_question(item: MmhalItem, row: Row) -> None:
    prompt = row.data.get("question", row.data.get("prompt"))
    if isinstance(prompt, str) and item.question.strip() not in prompt:
        raise DataError(
            f"{row.where}: it answers {prompt!r:.60}, but the item with this id asks "
            f"{item.question!r:.60}; number items from 0 in the order of the response file"
        )


def _request(prompt: PromptFile, item: MmhalItem) -> ChatRequest:
    text = prompt.fill(
        image_content=", ".join(item.contents),
        question=item.question,
        standard_answer=item.standard_answer,
        model_answer=item.answer or "",
    )
    return ChatRequest(
        prompt_version=prompt.version, subject=item.id, text=text, max_tokens=_MAX_TOKENS
    )


def _stats(item: MmhalItem, rating: int | None, types: Sequence[str]) -> list[float]:
    """Columns: all answers, then judged, rating and hallucination, over all and per type."""
    values = [0.0] * _PER_TYPE if rating is None else [1.0, float(rating), float(rating < 3)]
    nothing = [0.0] * _PER_TYPE
    own = [value for name in types for value in (values if name == item.type else nothing)]
    return [1.0, *values, *own]


def _words(item: MmhalItem) -> int:
    return len((item.answer or "").split())


def mmhal_figures(types: Sequence[str]) -> FigureFunction:
    """Make the figures for question types, in order of their columns."""

    def figures(sums: Stats) -> dict[str, Stats]:
        answers, judged, rated, hallucinated = (sums[..., column] for column in range(4))
        found = {
            "score": ratio(rated, judged),
            "hallucination_rate": ratio(hallucinated, judged),
            "official_score": ratio(rated, answers),
            "official_hallucination_rate": ratio(hallucinated + answers - judged, answers),
        }
        length = 1 + _PER_TYPE * (1 + len(types))  # earlier versions' results have no such column
        if sums.shape[-1] > length:
            found["length"] = ratio(sums[..., length], answers)
        for place, name in enumerate(types, start=1):
            count, rating, hallu = (
                sums[..., 1 + _PER_TYPE * place + column] for column in range(3)
            )
            found[f"type/{name}/score"] = ratio(rating, count)
            found[f"type/{name}/hallucination_rate"] = ratio(hallu, count)
        return found

    return figures


def _shown(item: MmhalItem, judgement: Judgement[int]) -> Json:
    return {
        "id": item.id,
        "image": item.image,
        "type": item.type,
        "question": item.question,
        "answer": item.answer,
        "standard_answer": item.standard_answer,
        "rating": judgement.value,
        "failure": judgement.failure,
        "judge": judgement.reply,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class MmhalOptions:
    """Options of ``fgaif eval mmhal``."""

    questions: Annotated[Path | None, typer.Option(help="The template with the 96 items.")] = None
    answers: Annotated[
        Path | None, typer.Option(help="Response file; or JSONL, with --questions.")
    ] = None
    judge_prompt: Annotated[Path | None, typer.Option(help="Prompt file instead of ours.")] = None
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of generated answers.")
    ] = 1024


def prepare_mmhal(options: MmhalOptions, context: EvalContext) -> PreparedBenchmark:
    """Make MMHal-Bench ready. Without questions the answers are a response file, which holds both.

    Raises:
        ConfigError, DataError: an option or a file cannot be used; the message names it.
    """
    builder = context.builder_unless(options.answers)
    judge_prompt = load_judge_prompt(options.judge_prompt or PROMPT)
    source = options.questions or needed(options.answers, "mmhal", "--questions or --answers")
    separate = options.answers if options.questions is not None else None
    questions: tuple[QuestionSet, ...] = ()
    if builder is not None:
        bench = read_items(source, answered=False)
        rows = [(str(item.index), item.image, item.question) for item in bench.items]
        questions = (builder.build("mmhal", rows, options.max_new_tokens),)
        separate = questions[0].file

    @cache
    def read() -> MmhalItems:
        if separate is None:
            return read_items(source)
        return with_answers(read_items(source, answered=False), separate)

    async def score(judges: Judges, progress: Progress) -> Scored:
        return await score_mmhal(read(), judges.needed_judge, judge_prompt, progress=progress)

    return PreparedBenchmark(
        benchmark="mmhal",
        score=score,
        judged=True,
        questions=questions,
        files={"questions": source} | ({"answers": separate} if separate else {}),
        items=len(questions[0].prompts) if questions else len(read().items),
    )


def prepare_official(data: Path, context: EvalContext, count: int) -> PreparedBenchmark | Path:
    """Make the official template of a folder ready, or return the path that is not there."""
    template = data / "mmhal-bench_answer_template.json"
    if not template.is_file():
        return template
    return prepare_mmhal(MmhalOptions(questions=template), context)


BENCHMARK = Benchmark(
    name="mmhal",
    title="MMHal-Bench",
    summary="96 questions, rated 0 to 6 by a judge",
    answers="--answers (response file, or JSONL with --questions)",
    truth="in the file",
    options=MmhalOptions,
    prepare=prepare_mmhal,
    figures=FIGURES,
    compute=mmhal_figures,
    models=("judge",),
    coverage=dict.fromkeys(("score", "hallucination_rate"), ("length",)),
    official=prepare_official,
)
