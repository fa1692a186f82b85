"""``fgaif prompts``: prompts files from a folder of images."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fgaif.data.folder import write_folder_prompts
from fgaif.data.prompts import skipped_warning
from fgaif.data.scenes.questions import DESCRIBE

out = Console()
err = Console(stderr=True)


def prompts(
    folder: Annotated[Path, typer.Argument(help="Folder with images, folders within included.")],
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder to write to; default: my_data.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help=f'Given to the images in turn; repeat it. Default: "{DESCRIBE}"'),
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0.001, max=0.9, help="Share of the images for the evaluation.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Draws the held-out images.")] = 0,
) -> None:
    """Make train.jsonl and held_out.jsonl from a folder of images, for data.train and
    data.held_out."""
    target = output or Path("my_data")
    made = write_folder_prompts(
        folder, target, held_out=held_out, texts=prompt or (DESCRIBE,), seed=seed
    )
    used = sum(made.rows.values())
    if warning := skipped_warning(str(folder), used + made.repeats, made.skipped):
        err.print(warning, style="yellow", markup=False, highlight=False)
    if made.repeats:
        err.print(f"{made.repeats} images are there twice; each counts once", highlight=False)
    for file, count in made.rows.items():
        out.print(f"wrote {file}: {count} prompts", markup=False, highlight=False, soft_wrap=True)
    train, held = made.rows
    keys = [f"data.train={train}", f"data.held_out={held}", f"data.image_root={folder}"]
    out.print(f"use them with: {shlex.join(keys)}", markup=False, highlight=False, soft_wrap=True)
