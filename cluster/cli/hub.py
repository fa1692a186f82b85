"""``fgaif push``: what a run has made, to the hub; ``fgaif convert``: LLaVA's original layout."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fgaif.errors import ConfigError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def push(
    folder: Annotated[
        Path, typer.Argument(help="RUN/policy/adapter, RUN/rewards, or what `fgaif export` wrote.")
    ],
    to: Annotated[str, typer.Option(metavar="ORG/NAME", help="Repository; made if there is none.")],
    run: Annotated[
        Path | None, typer.Option(help="Run that made it; default: the one that it lies in.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME@REVISION", help="The base, where a folder was trained on."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="If it is made.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files and the model card; send nothing.")
    ] = False,
) -> None:
    """Upload an adapter, reward models or an export to the Hugging Face Hub, with a model card.

    The token is taken from HF_TOKEN, or from `hf auth login`.
    """
    from fgaif.eval.publication import prepare, upload
    from fgaif.lvlm.hub import split_name

    if not _REPOSITORY.fullmatch(to):
        raise ConfigError(f"--to {to}: give ORG/NAME")
    if base is not None and split_name(base) is None:
        raise ConfigError(f"--base {base}: give ORG/NAME@REVISION")
    found = prepare(folder.expanduser(), to, run_dir=run, base=base)
    out = Console()
    for path in sorted((*found.files, "README.md")):
        out.print(path, markup=False, highlight=False, soft_wrap=True)
    out.print(f"{len(found.files) + 1} files, {found.size() / 2**20:,.1f} MiB", highlight=False)
    if found.base.repository is None:
        out.print(
            f"the base is called {found.base.name}, which others cannot load: --base "
            "ORG/NAME@REVISION says where they find it",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if dry_run:
        out.print(found.card, markup=False, highlight=False, soft_wrap=True)
    else:
        out.print(f"uploaded: {upload(found, to, private=private)}", markup=False, soft_wrap=True)


def convert(
    source: Annotated[
        str,
        typer.Argument(help="Checkpoint or LoRA adapter: a folder, or ORG/NAME@REVISION."),
    ],
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    vision: Annotated[
        str | None,
        typer.Option(help="CLIP's own folder or ORG/NAME@REVISION; default: what SOURCE names."),
    ] = None,
) -> None:
    """Turn a LLaVA-1.5 in its authors' layout into one that transformers, vLLM and fgaif load.

    For liuhaotian/llava-v1.5-7b and the like, and for LoRA adapters on such a model.
    """
    from fgaif.lvlm.convert import convert as write

    what = write(source, output.expanduser(), vision)
    use = f"policy.model={output}" if what == "checkpoint" else f"--model CHECKPOINT+{output}"
    Console().print(f"wrote {output}: a {what}; use it with {use}", markup=False, soft_wrap=True)
