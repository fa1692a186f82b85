"""Options that commands of ``fgaif eval`` share, as dataclasses, and commands made of them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fgaif.errors import ConfigError
from fgaif.eval.benchmark import ModelRole


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """Options of every benchmark."""

    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. cluster.rollout.gpus=1."),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT[+ADAPTER]", help="Generate the answers with it."),
    ] = None
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, which are found by path or name.")
    ] = None
    out: Annotated[Path | None, typer.Option(help="Folder for answers and results.")] = None
    corrupt: Annotated[
        str | None,
        typer.Option(metavar="KIND:STRENGTH", help="Show the model fog, blur or noise, 1 to 5."),
    ] = None
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file with cluster and endpoints.")
    ] = None
    seed: Annotated[int, typer.Option(help="Of resampling, drawing and corruption.")] = 0
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan and cost; do nothing.")] = (
        False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """Who judges: an entry of ``endpoints``, or a model described here."""

    judge: Annotated[str | None, typer.Option(help="Entry of `endpoints` in --config.")] = None
    judge_model: Annotated[str | None, typer.Option(help="Model name, instead of an entry.")] = None
    judge_url: Annotated[str | None, typer.Option(help="Its OpenAI-compatible base URL.")] = None
    judge_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with its key.")
    ] = None
    rejudge: Annotated[
        str | None,
        typer.Option(help="Second judge, another entry: compares both, and writes rejudge.json."),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(help="A rejudge.json: says what figures are worth at the old judge."),
    ] = None

    def __post_init__(self) -> None:
        if self.judge is not None and self.judge_model is not None:
            raise ConfigError("give --judge or --judge-model, not both")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierOptions:
    """Who verifies facts, if not the judge."""

    verifier: Annotated[
        str | None,
        typer.Option(help="Checkpoint on our engines that verifies; default: the judge."),
    ] = None


MODEL_OPTIONS: Mapping[ModelRole, type] = {"judge": JudgeOptions, "verifier": VerifierOptions}
"""Options of the commands whose benchmarks ask such a model."""


def command_of(groups: Mapping[str, type], call: Callable[..., None]) -> Callable[..., None]:
    """Make a command with the options of dataclasses, for typer.

    Args:
        groups: dataclasses whose fields are annotated for typer, by the name of the argument of
            ``call`` that takes an instance.
        call: what the command does.
    """

    def run(**values: Any) -> None:
        call(
            **{
                name: group(**{field.name: values[field.name] for field in fields(group)})
                for name, group in groups.items()
            }
        )

    parameters = [_parameter(group, field) for group in groups.values() for field in fields(group)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameter(group: type, field: Any) -> inspect.Parameter:
    hint = get_type_hints(group, include_extras=True)[field.name]
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
    )
