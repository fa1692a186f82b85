"""Every `fgaif` command of README, docs and CONTRIBUTING: it exists, as do its options, keys and
configurations. What the commands do is tried by ``tests/newcomer.sh``."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cluster.cli.main import app
from fgaif.config import load_config
from fgaif.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"```(?:sh|bash|console)\n(.*?)```", re.DOTALL)
_INLINE = re.compile(r"`(fgaif [^`]+)`")
_PLACEHOLDER = re.compile(r"^[A-Z][A-Z_/]*$|NAME|VARIABLE|\.\.\.|…|^\[|COMMAND|FILE")


def commands(page: Path) -> list[str]:
    """The `fgaif` commands of a page: lines of its shell blocks, and code in its text."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for block in _BLOCK.findall(text) for line in block.splitlines()]
    found = [line for line in lines if line.startswith("fgaif ")]
    found += [one for one in _INLINE.findall(_BLOCK.sub("", text)) if len(one.split()) > 1]
    return [part for one in found for part in _cut(one)]


def _cut(line: str) -> list[str]:
    """Commands of a line, without comments, pipes and redirections."""
    line = re.split(r"\s+#|\s[|>&]", line)[0]
    return [part.strip() for part in line.split(";") if part.strip().startswith("fgaif ")]


CASES = [(page.name, command) for page in PAGES for command in dict.fromkeys(commands(page))]


def parts(command: str) -> list[str]:
    words = shlex.split(command.replace("[", "").replace("]", ""))[1:]
    return [word for word in words if word not in ("...", "…")]


@pytest.mark.parametrize(("page", "command"), CASES)
def test_the_command_and_its_options_exist(page: str, command: str) -> None:
    group = typer.main.get_command(app)
    words, context = parts(command), group.make_context("fgaif", [], resilient_parsing=True)
    while words and hasattr(group, "list_commands"):
        if words[0].startswith("-") or words[0] in ("COMMAND", "BENCHMARK"):
            break
        name = words.pop(0)
        assert name in group.list_commands(context), f"{page}: no command {name!r} in {command!r}"
        group = group.get_command(context, name)
    known = {name for option in group.params for name in option.opts + option.secondary_opts}
    used = {word.split("=")[0] for word in words if word.startswith("-") and word != "-"}
    if hasattr(group, "list_commands"):  # options of all of its commands
        members = [group.get_command(context, name) for name in group.list_commands(context)]
        known |= {name for one in members for option in one.params for name in option.opts}
    assert used <= known | {"--help"}, f"{page}: {command!r}: no option {used - known}"


@pytest.mark.parametrize(("page", "command"), CASES)
def test_the_keys_and_configurations_exist(page: str, command: str) -> None:
    words = parts(command)
    keys = [word for word in words if re.match(r"^(name|dir|seed|[a-z_]+(\.[a-z0-9_]+)+)=", word)]
    for word in words:
        if word.startswith("configs/") and not _PLACEHOLDER.search(word):
            assert (ROOT / word).exists(), f"{page}: {command!r}: {word} is not there"
    for key in keys:
        name, _, value = key.partition("=")
        if _PLACEHOLDER.search(value) or value.startswith("api:"):
            value = "1" if name.endswith(("price_input", "price_output")) else value
        said = wrong_key(f"{name}={value}")
        assert said == "", f"{page}: {command!r}: {said}"


def wrong_key(override: str) -> str:
    """What is wrong with the name of a key; a placeholder as its value is not looked at."""
    try:
        load_config(None, [override])
    except ConfigError as error:
        return str(error) if "did you mean" in str(error) or "no such key" in str(error) else ""
    return ""


def test_a_command_that_is_not_there_is_noticed() -> None:
    assert CliRunner().invoke(app, ["frobnicate"]).exit_code == 2
    assert any(page == "README.md" for page, _ in CASES)
    assert len(CASES) > 60
    assert "did you mean" in wrong_key("ppo.setps=3")
