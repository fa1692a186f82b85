"""Object HalBench: CHAIR of detailed answers, per response and per mention (Rohrbach et al., 2018;
Yu et al., 2024).

As in RLAIF-V's ``eval_gpt_obj_halbench.py``: a judge lists the objects of an answer, each once, or,
by rule, words of the synonym table are mentions as in CHAIR. Objects of an image come from COCO.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from fgaif.chat.messages import ChatRequest, PromptFile, load_prompt
from fgaif.data.coco import read_coco
from fgaif.errors import ConfigError, DataError
from fgaif.eval.answers import Caption, image_finder, read_captions
from fgaif.eval.benchmark import Benchmark, EvalContext, Judges, PreparedBenchmark, needed
from fgaif.eval.benchmarks.chair import (
    caption_stats,
    coco_truth,
    official_annotations,
    with_own_table,
)
from fgaif.eval.figures import Figure
from fgaif.eval.judge import PROMPTS, Judgement, Progress, failures, judge_all
from fgaif.eval.questions import QuestionSet
from fgaif.eval.rows import read_rows
from fgaif.eval.scored import Scored, Stats, ratio
from fgaif.eval.vocabulary import Vocabulary, coco_vocabulary

PROMPT = PROMPTS / "object_halbench.txt"
SLOTS = ("question", "answer")
_MAX_TOKENS = 512
_FEW_WORDS = 3
_LIST = re.compile(r"\[[^\[\]]*\]", re.DOTALL)
COLUMNS = (
    "responses", "hallucinating", "mentions", "hallucinated", "shown", "covered", "words",
    "with_objects",
)  # fmt: skip
FIGURES = (
    Figure(
        key="response_hall",
        title="response",
        meaning="Responses with an object that the image does not show, of those that name any",
        better=-1,
    ),
    Figure(
        key="mention_hall",
        title="mention",
        meaning="Objects named that the image does not show",
        better=-1,
    ),
    Figure(
        key="all_hall",
        title="of all responses",
        meaning="Responses with an object that the image does not show, of all",
        better=-1,
    ),
    Figure(key="recall", title="recall", meaning="Objects of the image that are named", better=1),
    Figure(
        key="objects", title="objects", meaning="Objects named per response", better=0, share=False
    ),
    Figure(key="length", title="length", meaning="Words per response", better=0, share=False),
)


def read_objects(reply: str) -> list[str] | None:
    """Read the last JSON list of texts in a reply; None if there is none."""
    for found in reversed(_LIST.findall(reply)):
        try:
            names: Any = json.loads(found)
        except ValueError:
            continue
        if all(isinstance(name, str) for name in names):
            return list(names)
    return None


def listed_mentions(names: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """The table's objects among the names that a judge listed, each name once."""
    distinct = dict.fromkeys(" ".join(name.lower().split()) for name in names)
    return [found for name in distinct for found in vocabulary.mentions(name)]


def object_halbench_figures(sums: Stats) -> dict[str, Stats]:
    """Compute the figures from sums (..., 8) of ``COLUMNS``; NaN without a denominator."""
    c = dict(zip(COLUMNS, np.moveaxis(np.asarray(sums, np.float64), -1, 0), strict=True))
    return {
        "response_hall": ratio(c["hallucinating"], c["with_objects"]),
        "mention_hall": ratio(c["hallucinated"], c["mentions"]),
        "all_hall": ratio(c["hallucinating"], c["responses"]),
        "recall": ratio(c["covered"], c["shown"]),
        "objects": ratio(c["mentions"], c["responses"]),
        "length": ratio(c["words"], c["responses"]),
    }


def score_object_halbench(
    answers: Sequence[Caption],
    mentions: Sequence[Sequence[str]],
    truth: Mapping[str, frozenset[str]],
) -> Scored:
    """Score answers by the objects that each names; those of unknown images are left out, counted.

    Raises:
        DataError: no answer is about a known image.
    """
    find = image_finder(truth)
    known = [
        (replace(answer, image=find(answer.image)), named)
        for answer, named in zip(answers, mentions, strict=True)
        if find(answer.image) in truth
    ]
    if not known:
        raise DataError(
            "Object HalBench: the annotations know no image of the answers "
            f"({answers[0].image if answers else 'there are none'}); its 300 images are of COCO's "
            "train2014 and val2014: give the annotations of both"
        )
    rows, items = [], []
    for answer, named in known:
        shown = truth[answer.image]
        rows.append([*caption_stats(named, shown, len(answer.text.split())), bool(named)])
        items.append(
            {
                "id": answer.id,
                "image": answer.image,
                "question": answer.question,
                "answer": answer.text,
                "named": list(named),
                "hallucinated": [name for name in named if name not in shown],
                "shown": sorted(shown),
            }
        )
    stats = np.array(rows, np.float64)
    return Scored(
        benchmark="object-halbench",
        ids=tuple(answer.id for answer, _ in known),
        units=tuple(answer.image for answer, _ in known),
        stats=stats,
        figures=object_halbench_figures,
        items=tuple(items),
        badness=stats[:, COLUMNS.index("hallucinated")],
        counts={
            "answers_without_truth": len(answers) - len(known),
            "answers_without_objects": int((stats[:, COLUMNS.index("with_objects")] == 0).sum()),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectHalbenchOptions:
    """Options of ``fgaif eval object-halbench``."""

    annotations: Annotated[
        list[Path] | None,
        typer.Option(help="COCO instances and captions files, of train2014 and val2014."),
    ] = None
    questions: Annotated[
        Path | None, typer.Option(help="The 300 questions: rows with image_id and question.")
    ] = None
    answers: Annotated[
        Path | None, typer.Option(help="Rows with image_id (or in the questions' order) and text.")
    ] = None
    synonyms: Annotated[
        Path | None, typer.Option(help="RLAIF-V's synonyms_refine.txt; default: our table.")
    ] = None
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of generated answers.")
    ] = 1024


def prepare_object_halbench(
    options: ObjectHalbenchOptions, context: EvalContext
) -> PreparedBenchmark:
    """Make the benchmark ready; without a judge objects are found by rule.

    Raises:
        ConfigError, DataError: an option or a file cannot be used; the message names it.
    """
    if not options.annotations:
        raise ConfigError(
            "fgaif eval object-halbench needs --annotations: COCO's instances_*.json and "
            "captions_*.json of train2014 and val2014"
        )
    builder = context.builder_unless(options.answers)
    images = read_coco(*options.annotations)
    sets: tuple[QuestionSet, ...] = ()
    if builder is not None:
        file = needed(options.questions, "object-halbench", "--questions")
        rows = [
            (f"{n} {row.identity('image_id')}", row.identity("image_id"), row.text("question"))
            for n, row in enumerate(read_rows(file))
        ]
        sets = (builder.build("object_halbench", rows, options.max_new_tokens),)
    answers = sets[0].file if sets else needed(options.answers, "object-halbench", "--answers")
    by_judge = context.judge is not None
    prompt = load_prompt(PROMPT, SLOTS)

    async def score(judges: Judges, progress: Progress) -> Scored:
        vocabulary = coco_vocabulary(options.synonyms)
        given = read_object_answers(answers, None if sets else options.questions)
        truth = coco_truth(images, vocabulary)
        own_table = (lambda scored: scored) if options.synonyms else with_own_table
        if not by_judge:
            found = [vocabulary.mentions(answer.text) for answer in given]
            scored = score_object_halbench(given, found, truth)
            return own_table(replace(scored, provenance={"objects": "by rule"}))
        long = [a for a in given if len(a.text.split()) > _FEW_WORDS]
        judgements = await _listed(long, prompt, judges, progress)
        lists = {a.id: j.value for a, j in zip(long, judgements, strict=True)}
        kept = [a for a in given if lists.get(a.id, []) is not None]
        mentions = [listed_mentions(lists.get(a.id) or [], vocabulary) for a in kept]
        scored = score_object_halbench(kept, mentions, truth)
        about = {"judge": judges.needed_judge.name, "prompt": prompt.version}
        counts = {**scored.counts, **failures(judgements)}
        return own_table(replace(scored, provenance=about, counts=counts))

    return PreparedBenchmark(
        benchmark="object-halbench",
        score=score,
        judged=by_judge,
        questions=sets,
        files={
            **{f"annotations {path.name}": path for path in options.annotations},
            **({"questions": options.questions} if options.questions else {}),
            **({"synonyms": options.synonyms} if options.synonyms else {}),
            "answers": answers,
        },
        items=len(sets[0].prompts) if sets else 0,
    )


async def _listed(
    answers: Sequence[Caption], prompt: PromptFile, judges: Judges, progress: Progress
) -> list[Judgement[list[str]]]:
    """Ask the judge for the objects of each answer; those of three words or fewer have none."""

    def request(answer: Caption) -> ChatRequest:
        text = prompt.fill(question=answer.question, answer=answer.text)
        return ChatRequest(
            prompt_version=prompt.version, subject=answer.id, text=text, max_tokens=_MAX_TOKENS
        )

    return await judge_all(judges.needed_judge, answers, request, read_objects, progress=progress)


def read_object_answers(path: Path, questions: Path | None) -> list[Caption]:
    """Read answers; where rows name no image they are in the order of the ``questions``.

    Raises:
        DataError: a file or row cannot be used, or the two files do not go together row by row.
    """
    rows = read_rows(path)
    if any("image_id" in row.data or "image" in row.data for row in rows):
        return read_captions(path)
    if questions is None:
        raise DataError(
            f"{rows[0].where}: no key `image_id`; give the questions' file (--questions), in whose "
            "order the answers are"
        )
    asked = read_rows(questions)
    if len(asked) != len(rows):
        raise DataError(f"{path}: {len(rows)} answers to {len(asked)} questions of {questions}")
    found: list[Caption] = []
    for row, question in zip(rows, asked, strict=True):
        said = row.shown("question", "prompt")
        text = question.text("question")
        if said and text not in said:
            raise DataError(f"{row.where}: answers {said!r:.60}, not {text!r:.60}; sort the rows")
        image = question.identity("image_id")
        found.append(
            Caption(
                where=row.where,
                id=f"{image}#{len(found)}",
                image=str(int(image)) if image.isdecimal() else image,
                text=row.text("text", "answer", empty=True),
                question=text,
            )
        )
    return found


def prepare_official(data: Path, context: EvalContext, count: int) -> PreparedBenchmark | Path:
    """Make the benchmark ready from a folder with COCO's annotations and the 300 questions."""
    questions = data / "obj_halbench_300_with_image.jsonl"
    if not (annotations := official_annotations(data)):
        return data / "instances_*.json"
    if not questions.is_file():
        return questions
    options = ObjectHalbenchOptions(annotations=annotations, questions=questions)
    return prepare_object_halbench(options, context)


BENCHMARK = Benchmark(
    name="object-halbench",
    title="Object HalBench",
    summary="objects that detailed answers name and images do not show",
    answers="--answers",
    truth="--annotations (COCO instances, captions), --synonyms",
    options=ObjectHalbenchOptions,
    prepare=prepare_object_halbench,
    figures=FIGURES,
    compute=lambda groups: object_halbench_figures,
    models=("judge",),
    descriptions=True,
    coverage=dict.fromkeys(("response_hall", "mention_hall"), ("recall", "objects", "length")),
    official=prepare_official,
)
