"""``fgaif labels``: label tables from and to other tools, and the stored replies."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from cluster.cli.options import ConfigFile, Overrides
from fgaif.config import SCENES_CONFIG, Config, load_config
from fgaif.errors import ConfigError, DataError
from fgaif.types import Kind

Form = Literal["reference", "stepwise", "parquet"]

labels_app = typer.Typer(
    name="labels",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Label tables from and to other tools.\n\nForms: [bold]reference[/bold] is "
    '{"image", "sub", "labels"} of the paper\'s repository, [bold]stepwise[/bold] TRL\'s '
    "stepwise-supervision rows (one kind a file), [bold]parquet[/bold] everything that fgaif knows "
    "of a label.",
)
out = Console()
err = Console(stderr=True)

FormOption = Annotated[Form, typer.Option("--form", help="Form of the file.")]
KindOption = Annotated[
    str, typer.Option("--kind", help="For stepwise: one of the configured kinds, or any.")
]


@labels_app.command("export")
def export_labels(
    file: Annotated[Path, typer.Argument(help=".jsonl, .json or .parquet file to write.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    form: FormOption = "reference",
    kind: KindOption = "any",
    relative: Annotated[
        Path | None, typer.Option("--image-root", help="Write image paths relative to this.")
    ] = None,
) -> None:
    """Write a run's labels for another tool; what the form cannot say is left out and counted."""
    from cluster.pipeline.feedback_report import open_labels
    from fgaif.feedback.interchange import export_reference, export_stepwise
    from fgaif.feedback.parquet import write_labels

    settings = load_config(config or SCENES_CONFIG, overrides or [])
    labels = open_labels(settings)
    if form == "parquet":
        out.print(f"wrote {write_labels(labels, file)} responses to {file}", markup=False)
        return
    if form == "reference":
        done = export_reference(labels, file, relative)
    else:
        if kind not in (kinds := [*settings.kind_names, "any"]):
            raise ConfigError(f"--kind {kind}: give one of {', '.join(kinds)}")
        done = export_stepwise(labels, file, kind, relative)
    out.print(f"wrote {done.written} responses to {file}", markup=False)
    if done.warning():
        err.print(done.warning(), style="yellow", markup=False)


@labels_app.command("import")
def import_labels(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE... [KEY=VALUE]...", help="Stepwise: KIND:FILE, one per kind."),
    ],
    config: ConfigFile = None,
    form: FormOption = "reference",
    images: Annotated[
        Path | None, typer.Option("--image-root", help="Folder that the images lie in.")
    ] = None,
) -> None:
    """Make a run's labels from files, so that `fgaif train-reward` can start from them."""
    settings = load_config(config or SCENES_CONFIG, [name for name in files if "=" in name])
    paths = [name for name in files if "=" not in name]
    _import(settings, form, paths, images or settings.data.image_root)


@labels_app.command("replies")
def dump_replies(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Print every stored request and reply of a run as JSON lines, failures included."""
    from fgaif.chat.store import ReplyStore

    settings = load_config(config or SCENES_CONFIG, overrides or [])
    path = settings.run_dir / "feedback" / "replies.sqlite"
    if not path.is_file():
        raise DataError(f"{path}: does not exist; run `fgaif annotate` first")
    with ReplyStore(path) as store:
        for row in store:
            typer.echo(json.dumps(row))


def _import(config: Config, form: Form, names: list[str], root: Path | None) -> None:
    from cluster.pipeline.run_lock import driver_lock

    if not names:
        raise ConfigError("fgaif labels import: name at least one file")
    _require_new(config)
    with driver_lock(config.run_dir):
        _require_new(config)  # another import may have come first
        _import_into(config, form, names, root)


def _require_new(config: Config) -> None:
    for path in (_labels(config), _responses(config)):
        if path.exists():
            raise DataError(f"{path}: exists; import into another run, e.g. name=imported")


def _labels(config: Config) -> Path:
    return config.run_dir / "feedback" / "labels.jsonl"


def _responses(config: Config) -> Path:
    return config.run_dir / "responses" / "responses.jsonl"


def _import_into(config: Config, form: Form, names: list[str], root: Path | None) -> None:
    from cluster.pipeline.stage_status import StageStatus
    from fgaif.feedback.interchange import import_reference, import_stepwise, join_labels
    from fgaif.feedback.parquet import read_labels
    from fgaif.feedback.store import label_store, response_store
    from fgaif.kinds import check_kinds
    from fgaif.lvlm.model import load_processor, resolve_checkpoint

    tokenizer = load_processor(resolve_checkpoint(config.policy.model)).tokenizer
    pixels, kinds = config.data.max_image_pixels, config.kind_names
    if form == "parquet":
        labeled = [item for name in names for item in read_labels(Path(name))]
        for item in labeled:
            check_kinds(f"response {item.response.id}", item.kinds, kinds)
    else:
        sets = []
        for name in names:
            if form == "reference":
                found = import_reference(
                    Path(name), tokenizer, kinds=kinds, root=root, max_pixels=pixels
                )
            else:
                kind, path = _kind_and_path(name, kinds)
                found = import_stepwise(
                    path, kind, tokenizer, kinds=kinds, root=root, max_pixels=pixels
                )
            if found.warning():
                err.print(found.warning(), style="yellow", markup=False)
            sets.append(found.labeled)
        labeled = join_labels(sets) if form == "stepwise" else [x for part in sets for x in part]
    response_store(_responses(config)).append(item.response for item in labeled)
    label_store(_labels(config)).append(labeled)
    stage_status = StageStatus(config.run_dir)
    for stage in ("sample", "annotate"):
        stage_status.adopt(config, stage)
    out.print(f"imported {len(labeled)} labelled responses into {config.run_dir}", markup=False)


def _kind_and_path(name: str, kinds: Sequence[Kind]) -> tuple[Kind, Path]:
    kind, colon, path = name.partition(":")
    if not colon or kind not in kinds:
        raise ConfigError(
            f"{name}: for --form stepwise write KIND:FILE, KIND of {', '.join(kinds)}"
        )
    return kind, Path(path)
