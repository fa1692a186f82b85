"""AMBER: what descriptions invent and leave out, and yes/no questions (Wang et al., 2023).

By the rules of the official script (junyangwang0410/AMBER, ``inference.py``). The yes/no part is
that script's to the digit. In the descriptions it finds nouns with a tagger and near words with
word vectors, both downloaded; here rules (``fgaif.eval.nouns``) and a short table do, and
docs/evaluation.md says how much that changes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fgaif.errors import ConfigError, DataError
from fgaif.eval.amber_files import (
    AmberAnswer,
    AmberRow,
    AmberWords,
    beside,
    find_queries,
    read_annotations,
    read_queries,
    read_responses,
    read_words,
)
from fgaif.eval.amber_rules import (
    ASKED,
    DESCRIBED,
    PARTS,
    amber_figures,
    answer_stats,
    describe_stats,
)
from fgaif.eval.benchmark import Benchmark, EvalContext, Judges, PreparedBenchmark, needed
from fgaif.eval.benchmarks.pope import SUFFIX
from fgaif.eval.checks import MANY_DISAGREE, MANY_UNREAD, language_check, warned
from fgaif.eval.figures import Figure
from fgaif.eval.judge import Progress
from fgaif.eval.questions import QuestionBuilder, QuestionSet
from fgaif.eval.scored import Scored
from fgaif.eval.yes_no import read_strictly
from fgaif.types import Json

log = logging.getLogger(__name__)

NO_SYNONYMS = (
    "AMBER: no relation.json beside the annotations (--relation): synonyms of objects do not "
    "count, so that Cover is too low, and CHAIR compares with no published figure"
)
FIGURES = (
    Figure(
        key="amber_score",
        title="AMBER score",
        meaning="Mean of F1 and of what CHAIR leaves of 100 %",
        better=1,
    ),
    Figure(
        key="chair",
        title="CHAIR",
        meaning="Objects named that the image does not show",
        better=-1,
    ),
    Figure(key="cover", title="Cover", meaning="Objects of the image that are named", better=1),
    Figure(
        key="hal",
        title="Hal",
        meaning="Descriptions that name an object which the image does not show",
        better=-1,
    ),
    Figure(
        key="cog",
        title="Cog",
        meaning="Objects that people wrongly expect in the image, and that are named",
        better=-1,
    ),
    Figure(
        key="objects", title="objects", meaning="Objects per description", better=0, share=False
    ),
    Figure(key="length", title="length", meaning="Words per description", better=0, share=False),
    Figure(key="accuracy", title="accuracy", meaning="Questions answered right", better=1),
    Figure(key="precision", title="precision", meaning="No answers that are right", better=1),
    Figure(key="recall", title="recall", meaning="Questions to be denied that are", better=1),
    Figure(key="f1", title="F1", meaning="Harmonic mean of precision and recall", better=1),
    Figure(key="no_ratio", title="no ratio", meaning="Questions answered No", better=0),
    Figure(
        key="unreadable",
        title="unreadable",
        meaning="Answers that begin with neither yes nor no",
        better=-1,
    ),
)


def score_amber(
    annotations: Mapping[str, AmberRow],
    answers: Mapping[str, AmberAnswer],
    words: AmberWords,
    queries: Mapping[str, tuple[str, str]] | None = None,
) -> Scored:
    """Score answers by id against annotations by id.

    ``queries`` holds image and question by id; without it each question is resampled by itself.
    Questions without an answer, and answers without a question, are left out and counted.

    Raises:
        DataError: no answer fits an annotation.
    """
    queries = queries or {}
    ids = [identity for identity in annotations if identity in answers]
    if not ids:
        raise DataError(
            f"AMBER: no id of the answers ({', '.join(list(answers)[:3]) or 'there are none'}, ...)"
            " is annotated; give answers with AMBER's ids"
        )
    rows, items, badness = [], [], []
    width = len(DESCRIBED) + len(PARTS) * len(ASKED)
    for identity in ids:
        row, text = annotations[identity], answers[identity].text
        stats = np.zeros(width)
        image, question = queries.get(identity, ("", ""))
        item: Json = {"id": identity, "image": image, "question": question, "answer": text}
        if row.part is None:
            image = image or f"AMBER_{identity}.jpg"
            counts, more = describe_stats(text, row, words)
            stats[: len(DESCRIBED)] = counts
            badness.append(counts[DESCRIBED.index("hallucinated")])
            items.append({**item, "image": image, **more})
        else:
            start = len(DESCRIBED) + PARTS.index(row.part) * len(ASKED)
            counts = answer_stats(text, row.no)
            stats[start : start + len(ASKED)] = counts
            badness.append(1 - counts[ASKED.index("correct")])
            items.append({**item, "part": row.part, "label": "no" if row.no else "yes"})
        rows.append(stats)
    return Scored(
        benchmark="amber",
        ids=tuple(ids),
        units=tuple(item["image"] or item["id"] for item in items),
        stats=np.array(rows),
        figures=amber_figures,
        items=tuple(items),
        badness=np.array(badness, np.float64),
        counts={
            "questions_without_answer": len(annotations) - len(ids),
            "answers_without_question": len(answers) - len(ids),
        },
        warnings=warned(
            log,
            _description_checks([i for i in items if "named" in i], annotations),
            _answer_checks([i for i in items if "label" in i]),
            _question_checks([i for i in items if "label" in i], answers),
        ),
    )


def _description_checks(items: Sequence[Json], annotations: Mapping[str, AmberRow]) -> list[str]:
    all_ids = sum(row.part is None for row in annotations.values())
    texts = [item["answer"] for item in items]
    found = language_check("AMBER", texts, "its table of objects and the rules for nouns")
    if items and not any(item["named"] for item in items):
        found.append(
            f"AMBER: none of {len(items)} descriptions names an object of the benchmark, so CHAIR "
            "has no value; see the answers, and that ids 1 to 1004 hold descriptions"
        )
    if items and len(items) < all_ids:
        found.append(
            f"AMBER: {len(items)} of {all_ids} descriptions are there; published figures are over "
            "all of them"
        )
    return found


def _answer_checks(items: Sequence[Json]) -> list[str]:
    total, found = len(items), []
    readings = [(item, read_strictly(item["answer"])) for item in items]
    unread = [item for item, first in readings if first is None]
    apart = [
        item
        for item, first in readings
        if first is not None and item["answer"] != ("Yes" if first else "No")
    ]
    if len(unread) > MANY_UNREAD * total:
        found.append(
            f"AMBER: {len(unread)} of {total} answers begin with neither yes nor no, as "
            f"{unread[0]['answer']!r:.80}; they count as wrong"
        )
    if len(apart) > MANY_DISAGREE * total:
        found.append(
            f"AMBER: official and lenient rule disagree on {len(apart)} of {total} answers, as "
            f"{apart[0]['answer']!r:.80}; the official rule takes exactly Yes or No, and accuracy, "
            "precision, recall and F1 follow it: see lenient_accuracy and so on, or write bare "
            "words"
        )
    return found


def _question_checks(items: Sequence[Json], answers: Mapping[str, AmberAnswer]) -> list[str]:
    other = [
        item
        for item in items
        if (said := answers[item["id"]].question) and item["question"] not in said
    ]
    if not other:
        return []
    first = other[0]
    return [
        f"AMBER: {len(other)} of {len(items)} answers are to other questions than their ids say, "
        f"as {first['id']}: {answers[first['id']].question!r:.80}, where AMBER asks "
        f"{first['question']!r:.80}; give the answers to these questions"
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AmberOptions:
    """Options of ``fgaif eval amber``."""

    annotations: Annotated[
        Path | None, typer.Option(help="AMBER's annotations.json; its other files lie beside it.")
    ] = None
    answers: Annotated[
        list[Path] | None,
        typer.Option(help="Rows of id and response; repeat it for more files."),
    ] = None
    queries: Annotated[
        list[Path] | None,
        typer.Option(help="AMBER's query files; default: query_*.json beside the annotations."),
    ] = None
    relation: Annotated[
        Path | None, typer.Option(help="Near synonyms; default: relation.json beside them.")
    ] = None
    safe_words: Annotated[
        Path | None, typer.Option(help="Default: safe_words.txt beside the annotations.")
    ] = None
    prompt: Annotated[
        str | None, typer.Option(help="What --model is asked instead of AMBER's description query.")
    ] = None
    suffix: Annotated[str, typer.Option(help="Added to each yes/no question for --model.")] = SUFFIX
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of generated descriptions.")
    ] = 512


def prepare_amber(options: AmberOptions, context: EvalContext) -> PreparedBenchmark:
    """Make AMBER ready: descriptions, questions, or both, as far as there are answers.

    Raises:
        ConfigError, DataError: an option or a file cannot be used; the message names it.
    """
    file = needed(options.annotations, "amber", "--annotations")
    builder = context.builder_unless(options.answers)
    annotations = read_annotations(file)
    relation = options.relation or beside(file, "relation.json")
    safe_words = options.safe_words or beside(file, "safe_words.txt")
    query_files = options.queries or find_queries(file.parent)
    queries = read_queries(query_files)
    questions: tuple[QuestionSet, ...] = ()
    if builder is not None:
        questions = _questions(builder, annotations, queries, options)
    answers = [one.file for one in questions] or options.answers
    if not answers:
        raise ConfigError("fgaif eval amber needs --answers, or --model to generate them")

    async def score(judges: Judges, progress: Progress) -> Scored:
        words = read_words(annotations, relation, safe_words)
        scored = score_amber(annotations, read_responses(answers), words, queries)
        if relation is None and any("named" in item for item in scored.items):
            scored = replace(scored, warnings=(*scored.warnings, *warned(log, [NO_SYNONYMS])))
        return scored

    named = {"annotations": file, "relation": relation, "safe words": safe_words}
    return PreparedBenchmark(
        benchmark="amber",
        score=score,
        questions=questions,
        files={
            **{name: path for name, path in named.items() if path is not None},
            **{f"queries {path.stem}": path for path in query_files},
            **{f"answers {path.stem}": path for path in answers},
        },
        items=sum(len(one.prompts) for one in questions),
    )


def _questions(
    builder: QuestionBuilder,
    annotations: Mapping[str, AmberRow],
    queries: Mapping[str, tuple[str, str]],
    options: AmberOptions,
) -> tuple[QuestionSet, ...]:
    known = {i: queries[i] for i in annotations if i in queries}
    if not known:
        raise ConfigError(
            "fgaif eval amber --model needs --queries: AMBER's query_*.json, whose ids are those "
            "of the annotations"
        )
    described = [
        (i, image, options.prompt or text)
        for i, (image, text) in known.items()
        if annotations[i].part is None
    ]
    asked = [(i, *query) for i, query in known.items() if annotations[i].part is not None]
    sets = []
    if described:
        sets.append(builder.build("amber_generative", described, options.max_new_tokens))
    if asked:
        sets.append(builder.build("amber_discriminative", asked, 64, options.suffix))
    return tuple(sets)


def prepare_official(data: Path, context: EvalContext, count: int) -> PreparedBenchmark | Path:
    """Make AMBER ready from ``amber/annotations.json`` of a folder, or return that path."""
    file = data / "amber" / "annotations.json"
    return prepare_amber(AmberOptions(annotations=file), context) if file.is_file() else file


BENCHMARK = Benchmark(
    name="amber",
    title="AMBER",
    summary="objects that descriptions invent or leave out, and yes/no questions",
    answers="--answers",
    truth="--annotations, and beside it relation.json, safe_words.txt, query_*.json",
    options=AmberOptions,
    prepare=prepare_amber,
    figures=FIGURES,
    compute=lambda groups: amber_figures,
    nested=True,
    coverage=dict.fromkeys(
        ("generative/chair", "generative/hal", "generative/cog"),
        ("generative/cover", "generative/objects", "generative/length"),
    ),
    official=prepare_official,
)
