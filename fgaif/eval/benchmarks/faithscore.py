"""FaithScore: the share of an answer's atomic facts that the image bears out (Jing et al., 2024).

Three stages: a chat model sorts the answer's sub-sentences into descriptive and analytical ones; an
extractor states the atomic facts of the descriptive ones; a verifier checks each distinct fact with
the image. What fails is left out and counted, never taken for a verdict.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from fgaif.chat.messages import ChatModel
from fgaif.errors import DataError
from fgaif.eval.answer_facts import AnsweredImage, facts_of, read_lines
from fgaif.eval.benchmark import Benchmark, EvalContext, Judges, PreparedBenchmark, needed
from fgaif.eval.benchmarks.chair import official_annotations
from fgaif.eval.figures import OF_KIND, Figure
from fgaif.eval.judge import CONCURRENCY, READS, Progress, in_parallel, judge
from fgaif.eval.questions import QuestionSet
from fgaif.eval.rows import read_rows
from fgaif.eval.scored import FigureFunction, Scored, Stats, ratio
from fgaif.eval.subsentences import (
    PROMPT,
    Span,
    faithful,
    label_request,
    load_label_prompt,
    on_one_line,
    read_labels,
    sub_sentences,
)
from fgaif.feedback.extract import ModelFacts
from fgaif.feedback.facts import FactExtractor, FactVerifier, SceneFacts
from fgaif.feedback.verify import YesNoVerifier, kind_prompts, load_fact_prompt
from fgaif.types import (
    DEFAULT_KINDS,
    Answer,
    Fact,
    FactQuery,
    Json,
    Kind,
)

FIGURES = (
    Figure(
        key="faithscore",
        title="FaithScore",
        meaning="Mean share of an answer's atomic facts that the image bears out",
        better=1,
    ),
    Figure(
        key="faithscore_s",
        title="FaithScore by sentence",
        meaning="Mean share of an answer's descriptive sub-sentences without a wrong fact",
        better=1,
    ),
    Figure(key="facts", title="facts", meaning="Facts per answer", better=0, share=False),
    Figure(key="length", title="length", meaning="Words per answer", better=0, share=False),
    Figure(
        key=OF_KIND,
        title=f"{OF_KIND} facts",
        meaning="Facts of the kind that the image bears out",
        better=1,
    ),
)
Extractor = Literal["judge", "scenes"]
_AT_ONCE = 16
_FACTS_PER_ANSWER = 12
"""Assumed for the estimate of the third stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """An answer after the stages. ``problem`` names the stage that failed, or is empty.

    ``pieces`` are the descriptive sub-sentences and ``unsure`` the places of those of which not
    every fact was understood; ``verdicts`` are by the text of the fact.
    """

    pieces: tuple[str, ...] = ()
    unsure: frozenset[int] = frozenset()
    facts: tuple[Fact, ...] = ()
    verdicts: dict[str, Answer]
    problem: str = ""


class FaithScorer:
    """The three stages over given models; any number of answers at a time.

    Args:
        labeler: sorts sub-sentences; None takes them all as descriptive.
        prompt: what the labeler is told, with the slot ``{sub_sentences}``.
        min_words: as for the splitting of training responses.
        reads: times that the labeler is asked while its reply cannot be read.
        kinds: of the extractor's facts.
    """

    def __init__(
        self,
        extractor: FactExtractor,
        verifier: FactVerifier,
        labeler: ChatModel | None,
        *,
        prompt: Path = PROMPT,
        min_words: int = 5,
        reads: int = READS,
        kinds: Sequence[Kind] = DEFAULT_KINDS,
    ) -> None:
        self._extractor = extractor
        self._verifier = verifier
        self._labeler = labeler
        self._prompt = load_label_prompt(prompt)
        self._min_words = min_words
        self._reads = reads
        self._kinds = tuple(kinds)

    async def score(
        self,
        answers: Sequence[AnsweredImage],
        *,
        concurrency: int = CONCURRENCY,
        progress: Progress | None = None,
    ) -> Scored:
        """Score answers, ``concurrency`` of them at a time.

        Figures: ``faithscore`` (mean over answers of consistent / facts, 0 for an answer without
        facts), ``faithscore_s`` (mean of faithful / descriptive sub-sentences, 1 without any),
        ``facts`` per answer, and by the name of each kind the consistent share over all its facts;
        the kinds are the ``groups``. Facts with an unknown verdict are in none of them.

        Counts: ``answers_without_facts``, ``facts_unknown``, ``segments_malformed``; and of answers
        left out ``answers_unlabelled`` (stage 1), ``answers_unextracted`` (stage 2: no facts, and
        not everything understood), ``answers_unverified`` (stage 3: every verdict unknown).

        Raises:
            ServiceError: a model cannot be asked at all.
            DataError: no answer is left.
        """
        checked = await in_parallel(self._check, answers, concurrency, progress)
        problems = Counter(check.problem for check in checked)
        pairs = [
            (item, check) for item, check in zip(answers, checked, strict=True) if not check.problem
        ]
        left_out = {
            f"answers_{problem}": problems[problem]
            for problem in ("unlabelled", "unextracted", "unverified")
        }
        if not pairs:
            raise DataError(f"FaithScore: no answer of {len(answers)} could be scored: {left_out}")
        stats = np.array(
            [[*_stats(c, self._kinds), len(item.answer.split())] for item, c in pairs], np.float64
        )
        verdicts = Counter(answer for check in checked for answer in check.verdicts.values())
        return Scored(
            benchmark="faithscore",
            ids=tuple(item.id for item, _ in pairs),
            units=tuple(item.image for item, _ in pairs),
            stats=stats,
            figures=faithscore_figures(self._kinds),
            groups=self._kinds,
            items=tuple(_shown(item, check) for item, check in pairs),
            badness=1 - stats[:, 1],
            counts={
                "answers_without_facts": sum(not check.facts for _, check in pairs),
                "facts_unknown": verdicts["unknown"],
                "segments_malformed": sum(len(check.unsure) for check in checked),
                **left_out,
            },
            provenance=self._provenance(),
        )

    async def _check(self, item: AnsweredImage) -> _Checked:
        spans = sub_sentences(item.answer, self._min_words)
        kept = await self._descriptive(item, spans)
        if kept is None:
            return _Checked(verdicts={}, problem="unlabelled")
        found = await facts_of(self._extractor, item, kept)
        facts = tuple({fact.text: fact for fact in reversed(found.facts)}.values())[::-1]
        unsure = frozenset(found.malformed)
        if not facts and unsure:
            return _Checked(verdicts={}, unsure=unsure, problem="unextracted")
        queries = [FactQuery(image=item.ref, text=fact.text, kind=fact.kind) for fact in facts]
        verdicts = await in_parallel(self._verifier.verify, queries, _AT_ONCE)
        answers = {verdict.query.text: verdict.answer for verdict in verdicts}
        return _Checked(
            pieces=tuple(on_one_line(item.answer, span) for span in kept),
            unsure=unsure,
            facts=facts,
            verdicts=answers,
            problem="unverified" if answers and set(answers.values()) == {"unknown"} else "",
        )

    async def _descriptive(self, item: AnsweredImage, spans: list[Span]) -> list[Span] | None:
        if self._labeler is None or not spans:
            return spans
        texts = [on_one_line(item.answer, span) for span in spans]
        judged = await judge(
            self._labeler,
            label_request(self._prompt, texts),
            lambda reply: read_labels(reply, len(texts)),
            self._reads,
        )
        if judged.value is None:
            return None
        return [span for span, kept in zip(spans, judged.value, strict=True) if kept]

    def _provenance(self) -> dict[str, str]:
        stage1 = f"{self._labeler.name} {self._prompt.version}" if self._labeler else "none"
        return {
            "stage1": stage1,
            "extractor": self._extractor.name,
            "verifier": self._verifier.name,
            "prompt": self._verifier.prompt_version,
            "min_words": str(self._min_words),
        }


def _stats(check: _Checked, kinds: Sequence[Kind]) -> list[float]:
    """Columns: answers, f-score, sentence f-score, facts, then per kind consistent and facts."""
    right = [
        (fact.kind, answer == "yes")
        for fact in check.facts
        if (answer := check.verdicts[fact.text]) != "unknown"
    ]
    per_kind: list[float] = []
    for kind in kinds:
        own = [yes for of_kind, yes in right if of_kind == kind]
        per_kind += [sum(own), len(own)]
    flags = [flag for flag in _piece_flags(check) if flag is not None]
    f_score = sum(yes for _, yes in right) / len(right) if right else 0.0
    sentence = sum(flags) / len(flags) if flags else 1.0
    return [1.0, f_score, sentence, len(right), *per_kind]


def _piece_flags(check: _Checked) -> list[bool | None]:
    """Whether each descriptive sub-sentence is faithful; None if what was not understood of it
    may not be."""
    return [
        None if fine and place in check.unsure else fine
        for place, fine in enumerate(faithful(check.pieces, check.facts, check.verdicts))
    ]


def faithscore_figures(kinds: Sequence[Kind]) -> FigureFunction:
    """The function that computes the figures from sums of the columns of ``_stats`` and words."""
    return partial(_figures, kinds=tuple(kinds))


def _figures(sums: Stats, kinds: tuple[Kind, ...]) -> dict[str, Stats]:
    answers = sums[..., 0]
    length = 4 + 2 * len(kinds)  # words; results of earlier versions have no such column
    return {
        "faithscore": ratio(sums[..., 1], answers),
        "faithscore_s": ratio(sums[..., 2], answers),
        "facts": ratio(sums[..., 3], answers),
        **({"length": ratio(sums[..., length], answers)} if sums.shape[-1] > length else {}),
        **{
            kind: ratio(sums[..., 4 + 2 * place], sums[..., 5 + 2 * place])
            for place, kind in enumerate(kinds)
        },
    }


def _shown(item: AnsweredImage, check: _Checked) -> Json:
    return {
        "id": item.id,
        "image": item.image,
        "question": item.question,
        "answer": item.answer,
        "descriptive": [
            {"text": text, "faithful": flag}
            for text, flag in zip(check.pieces, _piece_flags(check), strict=True)
        ],
        "facts": [
            {"kind": fact.kind, "text": fact.text, "verdict": check.verdicts[fact.text]}
            for fact in check.facts
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class FaithscoreOptions:
    """Options of ``fgaif eval faithscore``."""

    answers: Annotated[Path | None, typer.Option("--answers", help="Answers that exist.")] = None
    questions: Annotated[
        Path | None, typer.Option(help="For --model: rows with image, prompt and optionally id.")
    ] = None
    extractor: Annotated[
        Extractor, typer.Option(help="Who states facts; scenes: the embedded world.")
    ] = "judge"
    label: Annotated[bool, typer.Option(help="Leave analytical sub-sentences out (stage 1).")] = (
        True
    )
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of generated answers.")
    ] = 512


def prepare_faithscore(options: FaithscoreOptions, context: EvalContext) -> PreparedBenchmark:
    """Make FaithScore ready; the judge does all three stages unless others are named.

    Raises:
        ConfigError, DataError: an option or a file cannot be used; the message names it.
    """
    builder = context.builder_unless(options.answers)
    questions: tuple[QuestionSet, ...] = ()
    if builder is not None:
        rows = _question_rows(needed(options.questions, "faithscore", "--questions"))
        questions = (builder.build("faithscore", rows, options.max_new_tokens),)
    file = questions[0].file if questions else needed(options.answers, "faithscore", "--answers")
    root = needed(context.images, "faithscore", "--images")
    kinds = tuple(kind.name for kind in context.kinds)
    text_form = context.judge is not None and context.judge.structured == "text"

    async def score(judges: Judges, progress: Progress) -> Scored:
        scorer = FaithScorer(
            SceneFacts(kinds)
            if options.extractor == "scenes"
            else ModelFacts(judges.needed_judge, text_form=text_form, kinds=context.kinds),
            YesNoVerifier(
                judges.verifier or judges.needed_judge,
                load_fact_prompt("statement"),
                kind_prompts(context.kinds),
            ),
            judges.needed_judge if options.label else None,
            min_words=context.min_words,
            kinds=kinds,
        )
        return await scorer.score(read_lines(file, root), progress=progress)

    return PreparedBenchmark(
        benchmark="faithscore",
        score=score,
        judged=options.label or options.extractor == "judge" or context.verifier is None,
        questions=questions,
        files={"answers": file},
        items=len(questions[0].prompts) if questions else 0,
        cost_note="these are stage 1; stages 2 and 3 depend on the replies: about 1 and "
        f"{_FACTS_PER_ANSWER} requests per answer, the latter with the image",
    )


def _question_rows(path: Path) -> list[tuple[str, str, str]]:
    return [
        (
            row.identity("id") if "id" in row.data else str(number),
            row.text("image"),
            row.text("prompt"),
        )
        for number, row in enumerate(read_rows(path), start=1)
    ]


def prepare_official(data: Path, context: EvalContext, count: int) -> PreparedBenchmark | Path:
    """Make the captions ready that CHAIR asks for in the same call, or return the missing path."""
    if not official_annotations(data):
        return data / "instances_*.json"
    captions = context.builder.answers_file("chair") if context.builder is not None else None
    return prepare_faithscore(FaithscoreOptions(answers=captions), replace(context, builder=None))


BENCHMARK = Benchmark(
    name="faithscore",
    title="FaithScore",
    summary="atomic facts checked with the image",
    answers="--answers (lines of `answer`, `image`)",
    truth="--images",
    options=FaithscoreOptions,
    prepare=prepare_faithscore,
    figures=FIGURES,
    compute=lambda groups: faithscore_figures(groups or DEFAULT_KINDS),  # older files name none
    models=("judge", "verifier"),
    descriptions=True,
    coverage=dict.fromkeys(("faithscore", "faithscore_s"), ("facts", "length")),
    official=prepare_official,
)
