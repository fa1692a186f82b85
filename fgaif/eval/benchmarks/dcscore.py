"""Precision and recall of atomic facts against reference captions, after DCScore (Ye et al., 2025).

An extractor states the facts of an answer and of what people wrote about the same image. A judge
says which facts of the answer the reference bears out and which facts of the reference the answer
states; what the reference is silent about is checked with the image. So a model that says less
loses recall, and one that says true things which nobody wrote down loses no precision.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from fgaif.chat.messages import ChatModel, ChatRequest, PromptFile, load_prompt
from fgaif.errors import DataError
from fgaif.eval.answer_facts import AnsweredImage, facts_of, read_lines
from fgaif.eval.answers import image_finder, image_name
from fgaif.eval.benchmark import Benchmark, EvalContext, Judges, PreparedBenchmark, needed
from fgaif.eval.figures import Figure
from fgaif.eval.judge import PROMPTS, READS, Progress, in_parallel, judge
from fgaif.eval.questions import QuestionSet
from fgaif.eval.rows import read_rows
from fgaif.eval.scored import Scored, Stats, ratio
from fgaif.eval.subsentences import sub_sentences
from fgaif.feedback.extract import ModelFacts
from fgaif.feedback.facts import FactExtractor, FactVerifier
from fgaif.feedback.verify import YesNoVerifier, kind_prompts, load_fact_prompt
from fgaif.types import Fact, FactQuery

PROMPT = PROMPTS / "dcscore.txt"
SLOTS = ("description", "statements")
_AT_ONCE = 16
_TOKENS, _TOKENS_PER_FACT = 64, 6
COLUMNS = ("answers", "facts", "right", "reference", "covered", "words")
FIGURES = (
    Figure(
        key="precision",
        title="precision",
        meaning="Facts of the answers that the reference or the image bears out",
        better=1,
    ),
    Figure(
        key="recall", title="recall", meaning="Facts of the references that answers state", better=1
    ),
    Figure(key="f1", title="F1", meaning="Harmonic mean of precision and recall", better=1),
    Figure(key="facts", title="facts", meaning="Facts per answer", better=0, share=False),
    Figure(key="true_facts", title="true facts", meaning="Per answer", better=1, share=False),
    Figure(key="length", title="length", meaning="Words per answer", better=0, share=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """An answer's facts and which are right (None: not known), the reference's and which are
    stated. ``problem`` names the stage that failed, or is empty."""

    facts: Mapping[str, bool | None] = field(default_factory=dict)
    reference: Mapping[str, bool] = field(default_factory=dict)
    problem: str = ""


def read_stated(reply: str, count: int) -> frozenset[int] | None:
    """Read ``{"stated": [numbers from 1 to count]}``; None for anything else."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        numbers: Any = json.loads(reply[start : end + 1])["stated"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(numbers, list) or not all(n in range(1, count + 1) for n in numbers):
        return None
    return frozenset(map(int, numbers))


class FactMatcher:
    """Precision and recall of facts over given models."""

    def __init__(
        self,
        extractor: FactExtractor,
        verifier: FactVerifier,
        judge: ChatModel,
        *,
        min_words: int = 5,
        reads: int = READS,
    ) -> None:
        self._extractor = extractor
        self._verifier = verifier
        self._judge = judge
        self._prompt: PromptFile = load_prompt(PROMPT, SLOTS)
        self._min_words = min_words
        self._reads = reads

    async def score(
        self,
        answers: Sequence[AnsweredImage],
        references: Mapping[str, str],
        *,
        progress: Progress | None = None,
    ) -> Scored:
        """Score answers against the reference of their image (``image_name``).

        Figures over all facts: precision = right / facts whose truth is known, recall = stated /
        facts of the references. Left out and counted: answers without a reference, and those of
        which a stage failed. Facts whose verdict is unknown are in neither.

        Raises:
            ServiceError: a model cannot be asked at all.
            DataError: no answer is left.
        """
        find = image_finder(references)
        pairs = [(a, references.get(find(image_name(a.image)), "")) for a in answers]
        known = [(answer, reference) for answer, reference in pairs if reference]
        checked = await in_parallel(self._check, known, progress=progress)
        kept = [(a, c) for (a, _), c in zip(known, checked, strict=True) if not c.problem]
        problems = Counter(check.problem for check in checked if check.problem)
        counts = {
            "answers_without_reference": len(answers) - len(known),
            **{f"answers_{name}": problems[name] for name in ("unextracted", "unmatched")},
            "facts_unknown": sum(v is None for _, c in kept for v in c.facts.values()),
        }
        if not kept:
            raise DataError(f"DCScore: no answer of {len(answers)} could be scored: {counts}")
        stats = np.array([_stats(answer, check) for answer, check in kept])
        return Scored(
            benchmark="dcscore",
            ids=tuple(answer.id for answer, _ in kept),
            units=tuple(answer.image for answer, _ in kept),
            stats=stats,
            figures=dcscore_figures,
            items=tuple(
                {
                    "id": answer.id,
                    "image": answer.image,
                    "question": answer.question,
                    "answer": answer.answer,
                    "facts": dict(check.facts),
                    "reference": dict(check.reference),
                }
                for answer, check in kept
            ),
            badness=stats[:, 1] - stats[:, 2],
            counts=counts,
            provenance={
                "extractor": self._extractor.name,
                "verifier": self._verifier.name,
                "verifier prompt": self._verifier.prompt_version,
                "judge": self._judge.name,
                "prompt": self._prompt.version,
            },
        )

    async def _check(self, pair: tuple[AnsweredImage, str]) -> _Checked:
        answer, reference = pair
        written = AnsweredImage(
            id=f"{answer.id} reference", image=answer.image, ref=answer.ref, answer=reference
        )
        own, theirs = await self._facts(answer), await self._facts(written)
        if own is None or not theirs:
            return _Checked(problem="unextracted")
        stated, covered = [
            await self._stated(list(facts), text)
            for facts, text in ((own, reference), (theirs, answer.answer))
        ]
        if stated is None or covered is None:
            return _Checked(problem="unmatched")
        open_facts = [fact for text, fact in own.items() if text not in stated]
        queries = [FactQuery(image=answer.ref, text=f.text, kind=f.kind) for f in open_facts]
        verdicts = await in_parallel(self._verifier.verify, queries, _AT_ONCE)
        right: dict[str, bool | None] = dict.fromkeys(own, True)
        for verdict in verdicts:
            truth = None if verdict.answer == "unknown" else verdict.answer == "yes"
            right[verdict.query.text] = truth
        return _Checked(facts=right, reference={text: text in covered for text in theirs})

    async def _facts(self, item: AnsweredImage) -> dict[str, Fact] | None:
        """Distinct facts by text; None if nothing could be extracted of what is there."""
        found = await facts_of(self._extractor, item, sub_sentences(item.answer, self._min_words))
        return {f.text: f for f in found.facts} if found.facts or not found.malformed else None

    async def _stated(self, facts: Sequence[str], text: str) -> set[str] | None:
        if not facts or not text.strip():
            return set()
        lines = "\n".join(f"{number}. {fact}" for number, fact in enumerate(facts, start=1))
        request = ChatRequest(
            prompt_version=self._prompt.version,
            subject=f"{text}\n{lines}",
            text=self._prompt.fill(description=" ".join(text.split()), statements=lines),
            max_tokens=_TOKENS + _TOKENS_PER_FACT * len(facts),
        )
        found = await judge(
            self._judge, request, lambda reply: read_stated(reply, len(facts)), self._reads
        )
        return None if found.value is None else {facts[number - 1] for number in found.value}


def _stats(answer: AnsweredImage, check: _Checked) -> list[float]:
    """Counts of one answer, in the order of ``COLUMNS``."""
    known = [right for right in check.facts.values() if right is not None]
    covered = sum(check.reference.values())
    words = len(answer.answer.split())
    return [1, len(known), sum(known), len(check.reference), covered, words]


def dcscore_figures(sums: Stats) -> dict[str, Stats]:
    """Compute the figures from sums (..., 6) of ``COLUMNS``; NaN without a denominator."""
    c = dict(zip(COLUMNS, np.moveaxis(np.asarray(sums, np.float64), -1, 0), strict=True))
    precision, recall = ratio(c["right"], c["facts"]), ratio(c["covered"], c["reference"])
    return {
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "facts": ratio(c["facts"], c["answers"]),
        "true_facts": ratio(c["right"], c["answers"]),
        "length": ratio(c["words"], c["answers"]),
    }


def read_references(path: Path) -> dict[str, str]:
    """Read reference captions by image: rows of ``image`` (or ``image_id``) and ``reference`` (or
    ``caption``, ``text``); several of one image are put together."""
    found: dict[str, list[str]] = {}
    for row in read_rows(path):
        image = image_name(row.identity("image", "image_id"))
        found.setdefault(image, []).append(row.text("reference", "caption", "text"))
    return {image: "\n".join(texts) for image, texts in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class DcscoreOptions:
    """Options of ``fgaif eval dcscore``."""

    references: Annotated[
        Path | None, typer.Option(help="Detailed captions by people: rows of image and caption.")
    ] = None
    answers: Annotated[Path | None, typer.Option(help="Lines of `answer` and `image`.")] = None
    prompt: Annotated[str, typer.Option(help="What --model is asked.")] = (
        "Describe this image in detail."
    )
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of generated answers.")
    ] = 512


def prepare_dcscore(options: DcscoreOptions, context: EvalContext) -> PreparedBenchmark:
    """Make the benchmark ready; the judge does all stages unless a verifier is named.

    Raises:
        ConfigError, DataError: an option or a file cannot be used; the message names it.
    """
    written = needed(options.references, "dcscore", "--references")
    references = read_references(written)
    builder = context.builder_unless(options.answers)
    sets: tuple[QuestionSet, ...] = ()
    if builder is not None:
        rows = [(image, image, options.prompt) for image in references]
        sets = (builder.build("dcscore", rows, options.max_new_tokens),)
    file = sets[0].file if sets else needed(options.answers, "dcscore", "--answers")
    root = needed(context.images, "dcscore", "--images")
    text_form = context.judge is not None and context.judge.structured == "text"

    async def score(judges: Judges, progress: Progress) -> Scored:
        matcher = FactMatcher(
            ModelFacts(judges.needed_judge, text_form=text_form, kinds=context.kinds),
            YesNoVerifier(
                judges.verifier or judges.needed_judge,
                load_fact_prompt("statement"),
                kind_prompts(context.kinds),
            ),
            judges.needed_judge,
            min_words=context.min_words,
        )
        return await matcher.score(read_lines(file, root), references, progress=progress)

    return PreparedBenchmark(
        benchmark="dcscore",
        score=score,
        judged=True,
        questions=sets,
        files={
            "references": needed(options.references, "dcscore", "--references"),
            "answers": file,
        },
        items=len(sets[0].prompts) if sets else 0,
        cost_note="these are the extractions; two comparisons per answer follow, and a question "
        "with the image for every fact that the reference does not bear out",
    )


BENCHMARK = Benchmark(
    name="dcscore",
    title="DCScore",
    summary="precision and recall of atomic facts against reference captions",
    answers="--answers (lines of `answer`, `image`)",
    truth="--references, --images",
    options=DcscoreOptions,
    prepare=prepare_dcscore,
    figures=FIGURES,
    compute=lambda groups: dcscore_figures,
    models=("judge", "verifier"),
    descriptions=True,
    coverage={"precision": ("recall", "facts", "length")},
)
