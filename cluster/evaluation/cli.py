"""``fgaif eval``: benchmarks on a checkpoint or on answers of any tool.

Commands import what they need themselves: ``--help`` and scoring start no torch and no Ray.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cluster.evaluation.options import (
    DESCRIBE,
    POPE_SUFFIX,
    Common,
    Extractor,
    JudgeOptions,
    command_with,
)
from fgaif.data.scenes.world import Split
from fgaif.errors import ConfigError

if TYPE_CHECKING:
    from cluster.evaluation.jobs import Job
    from cluster.evaluation.settings import Settings

eval_app = typer.Typer(
    name="eval",
    rich_markup_mode="rich",
    help="Evaluate: POPE, CHAIR, MMHal-Bench, LLaVA-Bench, FaithScore.\n\n"
    "A benchmark scores answers that exist ([bold]--answers[/bold], any tool's) or generates them "
    "first ([bold]--model[/bold]). [bold]--out DIR[/bold] keeps results; "
    "[bold]fgaif eval --compare A B[/bold] tests two of them against each other.",
)
out = Console()
err = Console(stderr=True)

Answers = Annotated[Path | None, typer.Option("--answers", help="Answers that exist.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length limit of generated answers.")]


@eval_app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Paired tests of two result folders."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder for the comparison's tables.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
) -> None:
    """Compare two models, or choose a benchmark."""
    if context.invoked_subcommand is not None and (compare or output or as_json or seed):
        raise ConfigError(
            "--compare stands alone, and options of a benchmark after its name: fgaif eval "
            f"{context.invoked_subcommand} ... --json"
        )
    if compare is not None:
        from cluster.evaluation.run import run_comparison

        run_comparison(*compare, output, seed=seed, as_json=as_json, console=out)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@eval_app.command()
@command_with(Common)
def pope(
    common: Common,
    questions: Annotated[
        list[str] | None,
        typer.Option(metavar="[SPLIT=]FILE", help="Official JSONL; repeat it for more splits."),
    ] = None,
    answers: Annotated[
        list[str] | None,
        typer.Option(metavar="[SPLIT=]FILE", help="model_vqa's or POPE's own form."),
    ] = None,
    suffix: Annotated[str, typer.Option(help="Added to each question for --model.")] = POPE_SUFFIX,
    max_new_tokens: MaxNewTokens = 64,
) -> None:
    """POPE: yes/no questions about objects. accuracy, precision, recall, f1, yes_ratio."""
    from cluster.evaluation.jobs import named_splits, paired_splits, pope_job
    from cluster.evaluation.settings import asker_of, settings_of

    settings = settings_of(common)
    if not questions:
        raise ConfigError("fgaif eval pope needs --questions; `fgaif eval build-pope` makes some")
    asker = asker_of(settings, answers)
    job = pope_job(
        named_splits(questions, "--questions"),
        {} if asker else paired_splits(questions, answers or []),
        asker,
        max_new_tokens=max_new_tokens,
        suffix=suffix,
    )
    _run([job], settings)


@eval_app.command()
@command_with(Common)
def chair(
    common: Common,
    annotations: Annotated[
        list[Path] | None,
        typer.Option(help="COCO instances and captions files; repeat it for more."),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option("--captions", "--answers", help="Captions that exist.")
    ] = None,
    synonyms: Annotated[
        Path | None, typer.Option(help="Table of objects in CHAIR's form; default: ours of COCO.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Annotated images drawn for --model.")] = 500,
    prompt: Annotated[str, typer.Option(help="What --model is asked.")] = DESCRIBE,
    max_new_tokens: MaxNewTokens = 512,
) -> None:
    """CHAIR: objects that captions name and images do not show. chair_i, chair_s, recall."""
    from cluster.evaluation.jobs import chair_job
    from cluster.evaluation.settings import asker_of, settings_of

    settings = settings_of(common)
    if not annotations:
        raise ConfigError(
            "fgaif eval chair needs --annotations: COCO's instances_*.json, and captions_*.json"
        )
    job = chair_job(
        annotations,
        captions,
        asker_of(settings, captions),
        synonyms=synonyms,
        count=count,
        seed=common.seed,
        max_new_tokens=max_new_tokens,
        prompt=prompt,
    )
    _run([job], settings)


@eval_app.command()
@command_with(Common, JudgeOptions)
def mmhal(
    common: Common,
    judging: JudgeOptions,
    questions: Annotated[Path | None, typer.Option(help="The template with the 96 items.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Response file; or JSONL, with --questions.")
    ] = None,
    judge_prompt: Annotated[Path | None, typer.Option(help="Prompt file instead of ours.")] = None,
    max_new_tokens: MaxNewTokens = 1024,
) -> None:
    """MMHal-Bench: 96 questions, rated 0 to 6 by a judge. score, hallucination_rate."""
    from cluster.evaluation.judged import mmhal_job
    from cluster.evaluation.settings import asker_of, settings_of

    settings = settings_of(common, judging)
    job = mmhal_job(
        questions,
        answers,
        asker_of(settings, answers),
        prompt=judge_prompt,
        max_new_tokens=max_new_tokens,
    )
    _run([job], settings)


@eval_app.command("llava-bench")
@command_with(Common, JudgeOptions)
def llava_bench(
    common: Common,
    judging: JudgeOptions,
    questions: Annotated[Path | None, typer.Option(help="Questions, JSONL.")] = None,
    references: Annotated[Path | None, typer.Option(help="Reference answers, JSONL.")] = None,
    contexts: Annotated[
        Path | None, typer.Option(help="Captions and boxes of the images, JSONL.")
    ] = None,
    answers: Answers = None,
    rules: Annotated[Path | None, typer.Option(help="rule.json instead of our rules.")] = None,
    reviews: Annotated[
        Path | None, typer.Option(help="Official review file: score it and ask nobody.")
    ] = None,
    max_new_tokens: MaxNewTokens = 1024,
) -> None:
    """LLaVA-Bench, COCO or in the wild: relative scores conv, detail, complex, all."""
    from cluster.evaluation.judged import llava_bench_job
    from cluster.evaluation.settings import asker_of, settings_of

    settings = settings_of(common, judging)
    job = llava_bench_job(
        questions,
        references,
        contexts,
        answers,
        asker_of(settings, answers or reviews),
        rules=rules,
        reviews=reviews,
        max_new_tokens=max_new_tokens,
    )
    _run([job], settings)


@eval_app.command()
@command_with(Common, JudgeOptions)
def faithscore(
    common: Common,
    judging: JudgeOptions,
    answers: Answers = None,
    questions: Annotated[
        Path | None, typer.Option(help="For --model: rows with image, prompt and optionally id.")
    ] = None,
    extractor: Annotated[
        Extractor, typer.Option(help="Who states facts; scenes: the embedded world.")
    ] = "judge",
    verifier: Annotated[
        str | None, typer.Option(help="LLaVA checkpoint on our engines; default: the judge.")
    ] = None,
    label: Annotated[
        bool, typer.Option(help="Leave analytical sub-sentences out (stage 1).")
    ] = True,
    max_new_tokens: MaxNewTokens = 512,
) -> None:
    """FaithScore: atomic facts checked with the image. faithscore, faithscore_s."""
    from cluster.evaluation.judged import faithscore_job
    from cluster.evaluation.settings import asker_of, settings_of

    settings = settings_of(common, judging, verifier)
    job = faithscore_job(
        answers,
        settings,
        asker_of(settings, answers),
        extractor=extractor,
        label=label,
        questions=questions,
        max_new_tokens=max_new_tokens,
    )
    _run([job], settings)


@eval_app.command("all")
@command_with(Common, JudgeOptions)
def every(
    common: Common,
    judging: JudgeOptions,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the official files under their names.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images for CHAIR and FaithScore.")] = 500,
) -> None:
    """All benchmarks whose files lie in one folder; without a judge, POPE and CHAIR."""
    from cluster.evaluation.judged import official_jobs
    from cluster.evaluation.settings import asker_of, settings_of

    settings = settings_of(common, judging)
    asker = asker_of(settings)
    if asker is None or data is None:
        raise ConfigError("fgaif eval all needs --model and --data")
    jobs, missing = official_jobs(data, settings, asker, count=count)
    for line in missing:
        err.print(line, style="yellow", highlight=False, markup=False)
    _run(jobs, settings, by_name=True)


@eval_app.command()
def corrupt(
    images: Annotated[Path, typer.Option(help="Folder with images, and folders in it.")],
    output: Annotated[Path, typer.Option("--out", help="Where the copies go, names kept.")],
    kind: Annotated[str, typer.Option(help="fog, blur or noise.")],
    strength: Annotated[int, typer.Option(help="From 1 to 5.")] = 3,
    seed: Annotated[int, typer.Option(help="Another seed, other fog and noise.")] = 0,
) -> None:
    """Write corrupted copies of an image set; goes on where it was interrupted."""
    from fgaif.eval.corrupt import Corruption, corrupt_folder

    corruption = Corruption.parse(f"{kind}:{strength}", seed)
    done = corrupt_folder(images, output, corruption)
    out.print(f"{done.made} copies made, {done.kept} kept in {output}", highlight=False)
    for item in done.skipped[:3]:
        err.print(f"left out {item.row}: {item.reason}", highlight=False, markup=False)
    if done.skipped:
        err.print(f"{len(done.skipped)} images left out", style="yellow")


@eval_app.command("build-pope")
def build_pope(
    output: Annotated[Path, typer.Option("--out", help="Folder for coco_pope_SPLIT.jsonl.")],
    annotations: Annotated[
        Path | None, typer.Option(help="COCO instances file, from which questions are drawn.")
    ] = None,
    scenes: Annotated[
        Split | None, typer.Option(help="A split of the embedded world, instead.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
) -> None:
    """Build POPE's questions, three splits, by the official sampling rule."""
    from fgaif.eval.pope import build_from_coco, build_from_scenes

    if (annotations is None) == (scenes is None):
        raise ConfigError("fgaif eval build-pope needs --annotations FILE or --scenes SPLIT")
    if scenes is not None:
        counts = build_from_scenes(scenes, output, count=count, seed=seed)
    else:
        assert annotations is not None
        counts = build_from_coco(annotations, output, count=count, seed=seed)
    for split, questions in counts.items():
        out.print(f"{split}: {questions} questions", highlight=False)
    out.print(f"wrote {output}", highlight=False)


def _run(jobs: "Sequence[Job]", settings: "Settings", by_name: bool = False) -> None:
    from cluster.evaluation.run import run_jobs

    run_jobs(jobs, settings, out, err, by_name=by_name)
