"""``fgaif eval``: benchmarks on a checkpoint or on answers of any tool.

The command of a benchmark is made from its declaration when it is asked for. Commands import what
they need themselves: ``--help`` and scoring start no torch and no Ray.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup
from typer.main import get_command

from cluster.evaluation.options import MODEL_OPTIONS, CommonOptions, JudgeOptions, command_of
from fgaif.data.scenes.world import Split
from fgaif.errors import ConfigError
from fgaif.eval.benchmark import Benchmark
from fgaif.eval.benchmarks import benchmark_names, load_benchmark


class EvalCommands(TyperGroup):
    """The commands below, and before them one for each benchmark.

    Contexts and commands are click's, or those of the copy of click that newer typers bring.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        return [*benchmark_names(), "rewards", *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, importing the benchmark whose name it is."""
        if cmd_name in benchmark_names():
            return benchmark_command(load_benchmark(cmd_name))
        if cmd_name == "rewards":
            return rewards_command()
        return super().get_command(ctx, cmd_name)


eval_app = typer.Typer(
    name="eval",
    cls=EvalCommands,
    rich_markup_mode="rich",
    help="Evaluate on a benchmark.\n\n"
    "A benchmark scores answers that exist ([bold]--answers[/bold], any tool's) or generates them "
    "first ([bold]--model[/bold]). [bold]--out DIR[/bold] keeps results; "
    "[bold]fgaif eval --compare A B[/bold] tests two of them against each other; "
    "[bold]fgaif eval --list[/bold] says what each benchmark needs.",
)
out = Console()
err = Console(stderr=True)


@eval_app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Paired tests of two result folders."),
    ] = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="Name all benchmarks with what they need.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check-setup", metavar="DIR", help="Is a result's set-up that of published figures?"
        ),
    ] = None,
    plots: Annotated[
        list[Path] | None,
        typer.Option("--plots", metavar="DIR", help="Result folders to draw; repeat it."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder for the comparison's tables, or the plots.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
) -> None:
    """Compare two models, list the benchmarks, or choose one."""
    if context.invoked_subcommand is not None and (
        compare or show_list or check or plots or output or as_json or seed
    ):
        raise ConfigError(
            "--compare stands alone, as do --check-setup, --plots and --list, and options of a "
            f"benchmark after its name: fgaif eval {context.invoked_subcommand} ... --json"
        )
    if compare is not None:
        from cluster.evaluation.run import run_comparison

        run_comparison(*compare, output, seed=seed, as_json=as_json, console=out)
        raise typer.Exit
    if plots:
        from cluster.evaluation.run import run_plots

        run_plots(plots, output, seed=seed, console=out)
        raise typer.Exit
    if check is not None:
        from cluster.evaluation.run import run_check

        run_check(check, as_json=as_json, console=out)
        raise typer.Exit
    if show_list:
        _print_benchmarks(as_json)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _print_benchmarks(as_json: bool) -> None:
    benchmarks = [load_benchmark(name) for name in benchmark_names()]
    if as_json:
        tree = {benchmark.name: describe(benchmark) for benchmark in benchmarks}
        sys.stdout.write(json.dumps(tree, ensure_ascii=False) + "\n")
        return
    for benchmark in benchmarks:
        about = describe(benchmark)
        out.print(f"{benchmark.name}: {benchmark.title}, {benchmark.summary}", style="bold")
        for line in (
            f"answers: {about['answers']}",
            f"ground truth: {about['truth']}",
            f"asks: {', '.join(about['asks']) or 'no other model'}",
            f"figures: {', '.join(about['figures'])}",
        ):
            out.print(f"  {line}", highlight=False, markup=False)


def describe(benchmark: Benchmark[Any]) -> dict[str, Any]:
    """Say what a benchmark is, what it needs, and what its figures mean."""
    return {
        "title": benchmark.title,
        "summary": benchmark.summary,
        "answers": f"{benchmark.answers}, or --model to generate them",
        "truth": benchmark.truth,
        "asks": list(benchmark.models),
        "figures": {figure.key: figure.meaning for figure in benchmark.figures},
    }


def benchmark_command(benchmark: Benchmark[Any]) -> Any:
    """Make the command of a benchmark: its own options, the shared ones, those of its models."""

    def run(own: Any, common: CommonOptions, **models: Any) -> None:
        from cluster.evaluation.run import run_benchmarks
        from cluster.evaluation.settings import eval_context, make_settings

        settings = make_settings(common, **models)
        run_benchmarks([benchmark.prepare(own, eval_context(settings))], settings, out, err)

    groups: dict[str, type] = {
        "own": benchmark.options,
        "common": CommonOptions,
        **{model: MODEL_OPTIONS[model] for model in benchmark.models},
    }
    figures = ", ".join(figure.key for figure in benchmark.figures)
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(benchmark.name, help=f"{benchmark.title}: {benchmark.summary}. {figures}.")(
        command_of(groups, run)
    )
    return get_command(app)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllOptions:
    """Options of ``fgaif eval all``."""

    data: Annotated[
        Path | None, typer.Option(help="Folder with the official files under their names.")
    ] = None
    count: Annotated[int, typer.Option(min=1, help="Images for CHAIR and FaithScore.")] = 500
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens of an answer, where a benchmark allows more; default: with --config "
            "its policy.max_new_tokens.",
        ),
    ] = None


def run_all(own: AllOptions, common: CommonOptions, judge: JudgeOptions) -> None:
    """Run every benchmark whose official files lie in the folder."""
    from cluster.evaluation.run import prepare_all, run_benchmarks
    from cluster.evaluation.settings import eval_context, make_settings

    settings = make_settings(common, judge)
    longest = own.max_new_tokens
    if longest is None and common.config is not None:
        longest = settings.config.policy.max_new_tokens
    context = eval_context(settings, longest)
    if context.builder is None or own.data is None:
        raise ConfigError("fgaif eval all needs --model and --data")
    prepared, missing = prepare_all(own.data, context, own.count, judged=bool(settings.judge))
    for line in missing:
        err.print(line, style="yellow", highlight=False, markup=False)
    run_benchmarks(prepared, settings, out, err, by_name=True)


eval_app.command(
    "all",
    help="All benchmarks whose files lie in one folder; without a judge, those that need none.",
)(command_of({"own": AllOptions, "common": CommonOptions, "judge": JudgeOptions}, run_all))


def evaluate_rewards(own: Any, common: CommonOptions, judge: JudgeOptions) -> None:
    """Score public data with reward models, a judge, or another tool's scores."""
    from cluster.evaluation.rewards import run_rewards
    from cluster.evaluation.settings import make_settings

    if common.model is not None:
        raise ConfigError("fgaif eval rewards generates nothing; leave --model out")
    run_rewards(own, make_settings(common, judge), out, err)


def rewards_command() -> Any:
    """Make the command ``rewards``: AUROC and the like on M-HalDetect, MHaluBench, ..."""
    from cluster.evaluation.rewards import RewardsOptions

    groups = {"own": RewardsOptions, "common": CommonOptions, "judge": JudgeOptions}
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(
        "rewards",
        help="Reward models and judges on public data with annotated hallucinations: AUROC, "
        "average precision, F1, calibration; best of n on VL-RewardBench.",
    )(command_of(groups, evaluate_rewards))
    return get_command(app)


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


@eval_app.command()
def guard(
    after: Annotated[
        list[Path],
        typer.Option("--from", help="Result files of lmms-eval or VLMEvalKit; repeat it."),
    ],
    before: Annotated[
        list[Path] | None, typer.Option(help="The same of the model before training; repeat it.")
    ] = None,
    beside: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE AFTER", help="Our result folders of the two, shown with it."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--out", help="Folder for guard.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read MM-Vet, MMBench, MMStar and the like: did the model lose what it could do?"""
    from cluster.evaluation.guard import run_guard

    run_guard(after, before or [], beside, output, as_json=as_json, console=out)


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
    from fgaif.eval.pope_questions import build_from_coco, build_from_scenes

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
