"""``fgaif pairs`` and ``fgaif baseline``: what PPO is to be held against."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from cluster.cli.options import ConfigFile, Overrides
from fgaif.config import SCENES_CONFIG, load_config

out = Console()


def pairs(
    overrides: Overrides = None,
    config: ConfigFile = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; default: RUN/pairs.")
    ] = None,
    score: Annotated[
        Literal["hallucinations", "claims", "reward"],
        typer.Option(
            help="Of labels: fewer hallucinated segments, fewer false claims (RLAIF-V), or PPO's "
            "reward."
        ),
    ] = "hallucinations",
    responses: Annotated[
        Path | None,
        typer.Option(help="Rows with image, prompt, response: score these with reward models."),
    ] = None,
    rewards: Annotated[
        Path | None, typer.Option(help="With --responses: their folder; default: RUN/rewards.")
    ] = None,
    per_prompt: Annotated[
        int, typer.Option(min=1, help="Pairs of a prompt at most, the largest differences first.")
    ] = 1,
    least: Annotated[
        float, typer.Option(min=0, help="Scores of a pair differ by more than this.")
    ] = 0.0,
    draw: Annotated[
        int | None, typer.Option(help="Seed: draw the pairs of a prompt instead.")
    ] = None,
) -> None:
    """Preference pairs and SFT rows of a run's labels or of any responses, in TRL's form.

    `preference.jsonl` has chosen and rejected with their scores, `sft.jsonl` the best response of
    each prompt; images by path. Ties are left out and counted.
    """
    from cluster.pipeline.pairs import PairOptions, write_run_pairs

    options = PairOptions(
        score=score,
        responses=responses,
        rewards=rewards,
        per_prompt=per_prompt,
        least=least,
        draw=draw,
    )
    write_run_pairs(load_config(config or SCENES_CONFIG, overrides or []), options, output, out)


def baseline(
    method: Annotated[
        Literal["sft", "dpo", "dpo-iterative"],
        typer.Argument(help="dpo-iterative samples, scores and trains in rounds."),
    ],
    overrides: Overrides = None,
    config: ConfigFile = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Your own rows or conversations; default: those of RUN/pairs."),
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Adapter to go on from; DPO's reference then too.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take pairs that another model's responses made.")
    ] = False,
    rewards: Annotated[
        Path | None, typer.Option(help="Of dpo-iterative; default: RUN/rewards.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
) -> None:
    """Train the run's policy by SFT or DPO with TRL -> RUN/baselines/METHOD/adapter.

    The result is a PEFT adapter like that of PPO. It needs the extra `baselines`. Interrupted, it
    goes on from its last checkpoint.
    """
    from cluster.pipeline.baselines import BaselineOptions, run_baseline

    options = BaselineOptions(
        data=data, start=start, any_base=any_base, rewards=rewards, dry_run=dry_run
    )
    run_baseline(load_config(config or SCENES_CONFIG, overrides or []), method, options, out)
