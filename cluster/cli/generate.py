"""``fgaif generate``: answers of a policy, the best of n or guarded by reward models."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.options import ConfigFile
from fgaif.config import SCENES_CONFIG, load_config

out = Console()


def generate(
    prompts: Annotated[
        str,
        typer.Argument(
            help="Rows with image and prompt (.jsonl, .parquet), coco:PATH, scenes:SPLIT."
        ),
    ],
    output: Annotated[Path, typer.Option("--out", help="Folder for answers.jsonl.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, e.g. seed=1."),
    ] = None,
    config: ConfigFile = None,
    model: Annotated[
        str | None, typer.Option(help="CHECKPOINT or CHECKPOINT+ADAPTER; default: policy.model.")
    ] = None,
    rewards: Annotated[
        Path | None, typer.Option(help="Reward models that choose: RUN/rewards.")
    ] = None,
    best_of: Annotated[
        int, typer.Option(min=1, max=256, help="Sample so many, answer with the best.")
    ] = 1,
    guard: Annotated[
        bool, typer.Option("--guard", help="Sample hallucinated sub-sentences again, or cut.")
    ] = False,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Of --guard: P(hallucinated) that is too much.")
    ] = 0.5,
    tries: Annotated[
        int, typer.Option(min=0, max=16, help="Of --guard: before the answer is cut.")
    ] = 4,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts at most; of scenes: data.eval_prompts.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, max=2, help="Default: 0, with --rewards policy.temperature."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
) -> None:
    """Answer prompts: greedily, with the best of n samples, or guarded by reward models.

    --best-of also says what 1, 2, 4, 8 and 16 samples would have given (summary.json,
    best_of.png). Interrupted, it goes on where it stopped.
    """
    from cluster.evaluation.decode import DecodeOptions, run_generate
    from cluster.evaluation.generate import ModelSpec
    from fgaif.serving.guard import GuardSettings

    settings = load_config(config or SCENES_CONFIG, overrides or [])
    options = DecodeOptions(
        prompts=prompts,
        out=output,
        rewards=rewards,
        best_of=best_of,
        guard=GuardSettings(threshold=threshold, tries=tries) if guard else None,
        limit=limit,
        temperature=temperature,
        dry_run=dry_run,
    )
    run_generate(settings, ModelSpec.parse(model or settings.policy.model), options, out)
