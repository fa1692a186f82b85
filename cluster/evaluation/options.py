"""Options that the benchmarks of ``fgaif eval`` share, as dataclasses instead of parameters."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from fgaif.errors import ConfigError

POPE_SUFFIX = "\nAnswer the question using a single word or phrase."
"""What the official evaluation adds to each question."""
DESCRIBE = "Describe this image in detail."
Extractor = Literal["judge", "scenes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
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

    def __post_init__(self) -> None:
        if self.judge is not None and self.judge_model is not None:
            raise ConfigError("give --judge or --judge-model, not both")


def command_with(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of dataclasses; it gets an instance of each, by its class."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters = inspect.signature(command).parameters
        grouped = {name: hints[name] for name in parameters if hints[name] in groups}
        own = [p.replace(annotation=hints[n]) for n, p in parameters.items() if n not in grouped]
        shared = [_parameter(group, field) for group in groups for field in fields(group)]

        @wraps(command)
        def run(**values: Any) -> None:
            for name, group in grouped.items():
                options = {field.name: values.pop(field.name) for field in fields(group)}
                values[name] = group(**options)
            command(**values)

        every = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in every}
        del run.__wrapped__
        return run

    return decorate


def _parameter(group: type, field: Any) -> inspect.Parameter:
    hint = get_type_hints(group, include_extras=True)[field.name]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hint
    )
