"""The benchmarks of ``fgaif eval`` that a judge scores: MMHal-Bench, LLaVA-Bench, FaithScore."""

from functools import cache
from pathlib import Path

from cluster.evaluation.generate import Asked
from cluster.evaluation.jobs import SPLITS, Asker, Job, Judges, chair_job, needed, pope_job
from cluster.evaluation.options import Extractor
from cluster.evaluation.settings import Settings, judge_settings
from fgaif.errors import DataError
from fgaif.eval.faithscore import FaithScorer, read_lines
from fgaif.eval.judge import Progress
from fgaif.eval.llava_bench import score_llava_bench, score_reviews
from fgaif.eval.llava_bench_files import load_rules, read_bench, rows_by_key
from fgaif.eval.mmhal import (
    PROMPT,
    MmhalItems,
    load_judge_prompt,
    read_items,
    score_mmhal,
    with_answers,
)
from fgaif.eval.rows import read_rows
from fgaif.eval.scored import Scored
from fgaif.feedback.extract import ModelFacts
from fgaif.feedback.facts import SceneFacts
from fgaif.feedback.verify import YesNoVerifier, load_fact_prompt

_LLAVA_BENCH = (
    "qa90_questions.jsonl",
    "qa90_gpt4_answer.jsonl",
    "caps_boxes_coco2014_val_80.jsonl",
)


def mmhal_job(
    questions: Path | None,
    answers: Path | None,
    asker: Asker | None,
    *,
    prompt: Path | None = None,
    max_new_tokens: int = 1024,
) -> Job:
    """MMHal-Bench. Without ``questions`` the answers are a response file, which holds both."""
    judge_prompt = load_judge_prompt(prompt or PROMPT)
    source = questions or needed(answers, "mmhal", "--questions or --answers")
    separate = answers if questions is not None else None
    asked: tuple[Asked, ...] = ()
    if asker is not None:
        bench = read_items(source, answered=False)
        rows = [(str(item.index), item.image, item.question) for item in bench.items]
        asked = (asker.ask("mmhal", rows, max_new_tokens),)
        separate = asked[0].file

    @cache
    def read() -> MmhalItems:
        if separate is None:
            return read_items(source)
        return with_answers(read_items(source, answered=False), separate)

    async def score(judges: Judges, progress: Progress) -> Scored:
        return await score_mmhal(read(), judges.needed_judge, judge_prompt, progress=progress)

    files = {"questions": source} | ({"answers": separate} if separate else {})
    return Job(
        benchmark="mmhal",
        score=score,
        judged=True,
        asked=asked,
        files=files,
        items=len(asked[0].prompts) if asked else len(read().items),
    )


def llava_bench_job(
    questions: Path | None,
    references: Path | None,
    contexts: Path | None,
    answers: Path | None,
    asker: Asker | None,
    *,
    rules: Path | None = None,
    reviews: Path | None = None,
    max_new_tokens: int = 1024,
) -> Job:
    """LLaVA-Bench, judged; or the official reviews of a file, without a judge."""
    if reviews is not None:

        async def read(judges: Judges, progress: Progress) -> Scored:
            return score_reviews(reviews, questions)

        files = {"reviews": reviews} | ({"questions": questions} if questions else {})
        return Job(benchmark="llava-bench", score=read, files=files)
    asked_file = needed(questions, "llava-bench", "--questions")
    reference_file = needed(references, "llava-bench", "--references")
    context_file = needed(contexts, "llava-bench", "--contexts")
    asked: tuple[Asked, ...] = ()
    rows = rows_by_key(asked_file, "question_id")
    if asker is not None:
        items = [(name, row.text("image"), row.text("text")) for name, row in rows.items()]
        asked = (asker.ask("llava-bench", items, max_new_tokens),)
    answer_file = asked[0].file if asked else needed(answers, "llava-bench", "--answers")

    async def score(judges: Judges, progress: Progress) -> Scored:
        bench = read_bench(asked_file, reference_file, context_file, answer_file)
        ruled = load_rules(rules, bench.in_the_wild)
        return await score_llava_bench(bench, judges.needed_judge, ruled, progress=progress)

    return Job(
        benchmark="llava-bench",
        score=score,
        judged=True,
        asked=asked,
        files={
            "questions": asked_file,
            "references": reference_file,
            "contexts": context_file,
            "answers": answer_file,
            **({"rules": rules} if rules else {}),
        },
        items=len(rows),
    )


def faithscore_job(
    answers: Path | None,
    settings: Settings,
    asker: Asker | None,
    *,
    extractor: Extractor = "judge",
    label: bool = True,
    questions: Path | None = None,
    max_new_tokens: int = 512,
) -> Job:
    """FaithScore of answers to anything; the judge does all three stages unless others are given.

    Args:
        extractor: ``judge``, or ``scenes`` for the English of the embedded world.
        label: ask which sub-sentences are descriptive; else all of them are.
        questions: rows ``image``, ``prompt`` and optionally ``id``, for the model.
    """
    asked: tuple[Asked, ...] = ()
    if asker is not None:
        rows = read_rows(needed(questions, "faithscore", "--questions"))
        items = [
            (
                row.identity("id") if "id" in row.data else str(n),
                row.text("image"),
                row.text("prompt"),
            )
            for n, row in enumerate(rows, start=1)
        ]
        asked = (asker.ask("faithscore", items, max_new_tokens),)
    file = asked[0].file if asked else needed(answers, "faithscore", "--answers")
    root = needed(settings.images, "faithscore", "--images")
    judged = label or extractor == "judge" or settings.verifier is None
    judge = judge_settings(settings.config, settings.judge) if judged else None
    text_form = judge is not None and judge.structured == "text"

    async def score(judges: Judges, progress: Progress) -> Scored:
        verifier = YesNoVerifier(
            judges.verifier or judges.needed_judge, load_fact_prompt("statement")
        )
        facts = (
            SceneFacts()
            if extractor == "scenes"
            else ModelFacts(judges.needed_judge, text_form=text_form)
        )
        labeler = judges.needed_judge if label else None
        words = settings.config.segment.min_words
        scorer = FaithScorer(facts, verifier, labeler, min_words=words)
        return await scorer.score(read_lines(file, root), progress=progress)

    return Job(
        benchmark="faithscore",
        score=score,
        judged=judged,
        asked=asked,
        files={"answers": file},
        items=len(asked[0].prompts) if asked else 0,
    )


def official_jobs(
    data: Path, settings: Settings, asker: Asker, *, count: int
) -> tuple[list[Job], list[str]]:
    """Jobs of all benchmarks whose official files lie in a folder, and why others are left out.

    FaithScore judges the captions that CHAIR asks for.

    Raises:
        DataError: there is no benchmark to run.
    """
    judged = settings.judge is not None
    jobs: list[Job] = []
    missing: list[str] = []
    splits = {split: data / f"coco_pope_{split}.jsonl" for split in SPLITS}
    if all(_there(missing, "pope", path) for path in splits.values()):
        jobs.append(pope_job(splits, {}, asker))
    annotations = sorted(data.glob("instances*.json")) + sorted(data.glob("captions*.json"))
    if annotations or _there(missing, "chair", data / "instances_*.json"):
        jobs.append(chair_job(annotations, None, asker, count=count, seed=settings.seed))
        if judged:
            captions = jobs[-1].asked[0].file
            jobs.append(faithscore_job(captions, settings, None))
    if not judged:
        missing.append("mmhal, llava-bench, faithscore: left out, no judge given (--judge)")
    elif _there(missing, "mmhal", data / "mmhal-bench_answer_template.json"):
        jobs.append(mmhal_job(data / "mmhal-bench_answer_template.json", None, asker))
    if judged and all(_there(missing, "llava-bench", data / name) for name in _LLAVA_BENCH):
        questions, references, contexts = (data / name for name in _LLAVA_BENCH)
        jobs.append(llava_bench_job(questions, references, contexts, None, asker))
    if not jobs:
        raise DataError(f"{data}: nothing to run there: {'; '.join(missing)}")
    return jobs, missing


def _there(missing: list[str], benchmark: str, path: Path) -> bool:
    if not path.is_file():
        missing.append(f"{benchmark}: left out, {path} does not exist")
    return path.is_file()
