"""``fgaif config``: every key of the configuration, with its default and what it means."""

from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from cluster.cli.options import ConfigFile
from fgaif.config import load_config
from fgaif.config.reference import key_docs, markdown
from fgaif.errors import ConfigError

out = Console()


def show_keys(
    prefix: Annotated[
        str, typer.Argument(metavar="[SECTION or KEY]", help="What keys begin with: ppo.shape.")
    ] = "",
    config: ConfigFile = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="The page docs/configuration.md, as it is.")
    ] = False,
) -> None:
    """Print every key of the configuration with its default and its meaning.

    With [bold]--config[/bold] the file's values stand in the place of the defaults.
    """
    if as_markdown:
        if prefix or config:
            raise ConfigError("--markdown prints the whole page; give it alone")
        print(markdown(), end="")
        return
    values = load_config(config, []) if config else None
    found = [
        doc
        for doc in key_docs(values=values)
        if f"{doc.key}.".startswith(f"{prefix.strip('.')}.") or not prefix
    ]
    if not found:
        raise ConfigError(f"{prefix}: no such key or section; `fgaif config` lists all")
    for doc in found:
        out.print(f"{doc.key} = {doc.default}", markup=False, style="bold", soft_wrap=True)
        meaning = Text(f"{doc.kind}. {doc.doc}")
        out.print(Padding(meaning, (0, 0, 0, 4)), highlight=False)
