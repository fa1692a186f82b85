"""The ``fgaif`` command."""

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from cluster.cli.baselines import baseline, pairs
from cluster.cli.generate import generate
from cluster.cli.hub import convert, push
from cluster.cli.jobs import jobs_app, submit
from cluster.cli.keys import show_keys
from cluster.cli.labels import labels_app
from cluster.cli.logs import logs
from cluster.cli.options import ConfigFile, Overrides
from cluster.cli.prompts import prompts
from cluster.cli.replay import replay
from cluster.cli.runs import list_runs, scale, status
from cluster.evaluation.cli import eval_app
from cluster.pipeline.keys import ORDER, Stage
from fgaif import __version__
from fgaif.config import SCENES_CONFIG, Config, dump_config, load_config
from fgaif.data.scenes.world import Split
from fgaif.errors import CheckpointError, ConfigError, DataError, FgaifError
from fgaif.interrupts import interrupt_on_sigterm

# Typer may carry its own copy of click: the parent of its BadParameter is that click's usage error.
_UsageError: Any = typer.BadParameter.__mro__[1]

_INTERRUPTED = 130

app = typer.Typer(
    name="fgaif",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Align vision-language models against hallucination with fine-grained AI feedback.\n\n"
    "[bold]fgaif demo[/bold] runs everything on the embedded world. Your own data: "
    "[bold]fgaif run --config configs/my_images.yaml[/bold]. Every stage can be run alone and "
    "resumes where it stopped.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong configuration or data, 130 interrupted (Ctrl-C "
    "or SIGTERM).",
)
out = Console()
err = Console(stderr=True)

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say what would be done and refuse what cannot be; start nothing."
    ),
]
Full = Annotated[
    bool,
    typer.Option(
        "--full", help="With --dry-run: configuration, placement and each actor's memory too."
    ),
]
Assume = Annotated[
    str | None,
    typer.Option(
        metavar="COUNTxGB",
        help="With --dry-run: compare memory with such GPUs, e.g. 4x80, instead of those found.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Redo stages that are up to date; their outputs move aside.")
]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def whole(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def demo(
    overrides: Overrides = None,
    dry_run: DryRun = False,
    force: Force = False,
    assume: Assume = None,
    full: Full = False,
) -> None:
    """Align the embedded policy end to end, on two CPU cores, in a few minutes."""
    _run(None, overrides, dry_run, force, assume, full)


@app.command()
def run(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    force: Force = False,
    assume: Assume = None,
    full: Full = False,
) -> None:
    """Run all stages: sample, annotate, train-reward, eval, train, eval, report."""
    _run(config, overrides, dry_run, force, assume, full)


@app.command()
def sample(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    force: Force = False,
    assume: Assume = None,
    full: Full = False,
) -> None:
    """Step 1a: sample responses from the policy -> RUN/responses."""
    _run(config, overrides, dry_run, force, assume, full, "sample")


@app.command()
def annotate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    assume: Assume = None,
    full: Full = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Label anew; stored replies are used, failed requests asked again."
        ),
    ] = False,
    max_cost: Annotated[
        float | None,
        typer.Option(help="Money that all replies of the run may cost (feedback.max_cost)."),
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Write a page to check verdicts by hand; start nothing.")
    ] = False,
    answers: Annotated[
        Path | None, typer.Option(help="With --audit: the page's answers; report on them.")
    ] = None,
    second: Annotated[
        Path | None,
        typer.Option(help="With --answers: labels of another verifier, for Cohen's kappa."),
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="With --audit: facts to check.")] = 120,
) -> None:
    """Step 1b: split, extract facts, verify, label -> RUN/feedback.

    Facts and verdicts come from a local checkpoint or from any OpenAI-compatible API, see
    [bold]feedback[/bold] and [bold]endpoints[/bold] in the configuration. It can be stopped at any
    moment; what was paid for is never asked again. [bold]--dry-run[/bold] counts the requests.
    """
    if (answers and not audit) or (second and not answers):
        raise ConfigError("--answers goes with --audit, and --second with --answers")
    extra = [f"feedback.max_cost={max_cost}"] if max_cost is not None else []
    if not audit:
        _run(config, [*(overrides or []), *extra], dry_run, force, assume, full, "annotate")
        return
    from cluster.pipeline.feedback_report import prepare_audit, report_audit

    settings = _load(config, overrides)
    if answers is None:
        named = ["--config", str(config)] if config else []
        same = shlex.join(["fgaif", "annotate", *named, *(overrides or [])])
        prepare_audit(settings, size, f"{same} --audit --answers FILE", out)
    else:
        report_audit(settings, answers, second, out)


@app.command("train-reward")
def train_reward(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    force: Force = False,
    assume: Assume = None,
    full: Full = False,
    form: Annotated[
        Literal["segment", "preference"] | None,
        typer.Option(help="A model of each kind, or Fact-RLHF's of preferences (reward.form)."),
    ] = None,
) -> None:
    """Step 2: train one reward model per kind -> RUN/rewards/KIND, or one of preferences."""
    extra = [f"reward.form={form}"] if form is not None else []
    _run(config, [*(overrides or []), *extra], dry_run, force, assume, full, "train-reward")


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    force: Force = False,
    assume: Assume = None,
    full: Full = False,
    resume: Annotated[
        str | None, typer.Option(help="'latest' or a checkpoint directory: go on from there.")
    ] = None,
) -> None:
    """Step 3: PPO with per-token rewards -> RUN/policy."""
    extra = [f"ppo.resume={resume}"] if resume else []
    _run(config, [*(overrides or []), *extra], dry_run, force, assume, full, "train")


@eval_app.command("run")
def evaluate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    force: Force = False,
    assume: Assume = None,
    full: Full = False,
) -> None:
    """The run's policy before and after training, on held-out images -> RUN/eval."""
    _run(config, overrides, dry_run, force, assume, full, "eval-before", "eval-after")


@app.command()
def study(
    config: ConfigFile = None,
    overrides: Overrides = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Run nothing; sum up what is finished.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(metavar="VARIANT:SEED", help="Make this training alone; sum up nothing."),
    ] = None,
) -> None:
    """Compare variants of a run over seeds -> RUN/study.{json,html,tex}, with paired tests."""
    from cluster.pipeline.study import run_study

    run_study(_load(config, overrides), out, summary=summary, only=only)


@app.command()
def report(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Write RUN/report/report.json, report.html and plots from what the stages left."""
    from cluster.pipeline.stages import make_report

    make_report(_load(config, overrides), out)


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter directory; default: RUN/policy/adapter.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Precision of the written weights; default: policy.dtype."),
    ] = None,
    allow_loss: Annotated[
        bool,
        typer.Option("--allow-loss", help="Write even where rounding loses over 5 % of it."),
    ] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the PEFT adapter alone, unmerged.")
    ] = False,
) -> None:
    """Merge the adapter into the policy: a checkpoint that transformers and vLLM load.

    Merging is done in float32 and rounded once; what survives of the update is printed.
    """
    from fgaif.lvlm.export import LEAST_SURVIVING, export_adapter, export_merged
    from fgaif.lvlm.model import resolve_checkpoint

    settings = _load(config, overrides)
    source = adapter or settings.run_dir / "policy" / "adapter"
    if not (source / "adapter_config.json").is_file():
        fix = "give the folder of a PEFT adapter" if adapter else "run `fgaif train`, or --adapter"
        raise CheckpointError(f"{source}: no adapter there (adapter_config.json); {fix}")
    if adapter_only:
        export_adapter(source, output)
        out.print(f"wrote {output}: the adapter, to be loaded on {settings.policy.model}")
        return
    written = dtype or settings.policy.dtype
    kept = export_merged(
        resolve_checkpoint(settings.policy.model),
        source,
        output,
        dtype=written,
        least=-math.inf if allow_loss else LEAST_SURVIVING,
    )
    out.print(
        f"wrote {output}: {kept.share:.1%} of the update survive in {written} "
        f"({kept.weakest:.1%} in the weakest layer); the adapter itself is in {output}/adapter"
    )


@app.command("openai-server")
def openai_server(
    model: Annotated[
        str, typer.Argument(help="Checkpoint directory, ORG/NAME@REVISION, or scenes:verifier.")
    ],
    overrides: Overrides = None,
    config: ConfigFile = None,
    name: Annotated[
        str | None, typer.Option(help="Model name for clients; default: the checkpoint's.")
    ] = None,
    host: Annotated[str, typer.Option(help="Others can reach all but 127.0.0.1.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command.")] = False,
) -> None:
    """Serve a local checkpoint with vLLM's OpenAI-compatible server, settings from the config.

    Point an entry of [bold]endpoints[/bold] at http://HOST:PORT/v1. Clients must send the key in
    VLLM_API_KEY if that is set, which any address but loopback needs.
    """
    import os

    from actors.openai_server import server_command, server_environment
    from fgaif.lvlm.hub import model_name
    from fgaif.lvlm.model import resolve_checkpoint

    path = resolve_checkpoint(model)
    command = server_command(path, name or model_name(path), _load(config, overrides), host, port)
    if dry_run:
        out.print(shlex.join(command), markup=False, soft_wrap=True)
    else:
        os.execvpe(command[0], command, server_environment())


@app.command("serve")
def serve_rewards(
    rewards: Annotated[
        Path, typer.Option(help="Folder with object/, attribute/, relation/, or ORG/NAME@REVISION.")
    ],
    overrides: Overrides = None,
    config: ConfigFile = None,
    host: Annotated[str, typer.Option(help="Others can reach all but 127.0.0.1.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    policy: Annotated[
        str | None,
        typer.Option(help="CHECKPOINT[+ADAPTER] that answers /v1/generate; default: none."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the Serve config file.")
    ] = False,
) -> None:
    """Serve trained reward models over HTTP, with a page at /, until Ctrl-C.

    Clients must send the key in FGAIF_SERVE_KEY if that is set, which any address but loopback
    needs. [bold]--dry-run[/bold] prints a file for `serve deploy`.
    """
    from cluster.serving.deployments import ServeArgs
    from cluster.serving.start import print_service, run_service
    from fgaif.lvlm.hub import local_folder
    from fgaif.reward.checkpoint import SAVED_FILES

    settings = _load(config, overrides)
    folder = local_folder(str(rewards), SAVED_FILES)
    args = ServeArgs(rewards=folder, config=config, set=tuple(overrides or ()), policy=policy)
    if dry_run:
        print_service(settings, args, host, port, out)
    else:
        run_service(settings, args, host, port, out)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Also whether this run fits the memory.")
    ] = None,
    overrides: Overrides = None,
    assume: Annotated[
        str | None,
        typer.Option(metavar="COUNTxGB", help="With --config: such GPUs, e.g. 4x80."),
    ] = None,
) -> None:
    """Check versions, devices, memory, disk and ports, and say what to do."""
    from cluster.cli.doctor import run as examine

    if config is None and (overrides or assume):
        raise ConfigError("overrides and --assume go with --config")
    settings = None if config is None else load_config(config, overrides or [])
    raise typer.Exit(examine(out, settings, assume))


@app.command()
def scenes(
    output: Annotated[Path, typer.Argument(help="Directory to write images and JSONL to.")],
    split: Annotated[Split, typer.Option(help="train, val or test.")] = "test",
    count: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 8,
) -> None:
    """Draw scenes of the embedded world with their scene graphs, to look at."""
    from fgaif.data.scenes.files import write_split

    if (output / "prompts.jsonl").exists() and not (output / "scenes.jsonl").exists():
        raise DataError(f"{output}/prompts.jsonl: not of drawn scenes; name another directory")
    write_split(output, split, count)
    out.print(f"wrote {count} scenes of split {split} to {output}")


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


# After the stages, so that --help begins with what a newcomer runs first.
app.command()(prompts)
app.command("config")(show_keys)
app.add_typer(labels_app)
app.add_typer(jobs_app)
app.command()(submit)
app.command()(status)
app.command()(logs)
app.command()(scale)
app.command("list")(list_runs)
app.command()(replay)
app.command()(push)
app.command()(convert)
app.command()(pairs)
app.command()(baseline)
app.command()(generate)
app.add_typer(eval_app)


def main() -> None:
    """Entry point: one clear message per failure, and exit codes that scripts can use."""
    interrupt_on_sigterm()
    try:
        code = app(standalone_mode=False)  # Typer turns Ctrl-C into this exit code
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        message = "interrupted: what was finished is kept; run the same command to go on"
        _fail(message, _INTERRUPTED)
    except _UsageError as error:
        _fail(error.format_message(), 2)
    except (ConfigError, DataError, CheckpointError) as error:
        _fail(str(error), 2)
    except (FgaifError, OSError) as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> NoReturn:
    # As text: a message may hold square brackets, which are no markup.
    err.print(Text.assemble(("error: ", "red"), message), soft_wrap=True)
    sys.exit(code)


def _load(config: Path | None, overrides: list[str] | None) -> Config:
    settings = load_config(config or SCENES_CONFIG, overrides or [])
    models = (settings.policy.model, settings.reward_backbone, *settings.feedback.verifiers)
    if not any("@" in name for name in (*models, settings.eval.second_verifier or "")):
        return settings
    from fgaif.lvlm.hub import pin_models  # torch: not where all models are folders

    return pin_models(settings)


def _run(
    config: Path | None,
    overrides: list[str] | None,
    dry_run: bool,
    force: bool,
    assume: str | None,
    full: bool,
    *stages: Stage,
) -> None:
    settings = _load(config, overrides)
    if full and not dry_run:
        raise ConfigError("--full goes with --dry-run: it is its long view")
    if assume is not None and not dry_run:
        raise ConfigError("--assume goes with --dry-run: a run uses the devices that there are")
    # Before torch and Ray, whose import takes seconds, and on a cold disk many.
    names = ", ".join(stages) or "all stages"
    out.print(
        f"{settings.run_dir}: {names}; loading", highlight=False, markup=False, soft_wrap=True
    )
    from cluster.memory.devices import devices_of
    from cluster.memory.plan import show_memory
    from cluster.memory.seconds import show_seconds
    from cluster.pipeline.dry_run import print_plan, stage_roles
    from cluster.pipeline.stages import run_stages

    if dry_run:
        if full:
            out.print(dump_config(settings), highlight=False, markup=False)
        print_plan(settings, stages or ORDER, force, out, full=full)
        roles = stage_roles(settings, stages or ORDER)
        devices = devices_of(settings, assume)
        show_memory(settings, roles, devices, out, full=full)
        if full:
            show_seconds(settings, roles, devices, out)
        if not full:
            out.print(
                "--full adds configuration, placement, each actor's memory, time, requests by model"
            )
    else:
        run_stages(settings, stages or ORDER, force, out)
