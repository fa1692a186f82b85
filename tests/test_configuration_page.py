"""`fgaif config` and docs/configuration.md, which is made by it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import fgaif
from cluster.cli import keys
from cluster.cli.main import app
from cluster.pipeline.keys import leaf_keys
from fgaif.config import load_config
from fgaif.config.reference import key_docs, markdown
from fgaif.errors import ConfigError

PAGE = Path(fgaif.__file__).parents[1] / "docs" / "configuration.md"


def config(*arguments: str) -> str:
    keys.out.width = 200
    result = CliRunner().invoke(app, ["config", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_page_is_what_the_command_prints() -> None:
    """Make it anew: fgaif config --markdown > docs/configuration.md."""
    assert PAGE.read_text(encoding="utf-8") == markdown() == config("--markdown")


def test_every_key_is_there_and_has_a_meaning() -> None:
    docs = list(key_docs())
    there = {doc.key.replace(".NAME.", ".*.") for doc in docs}
    missing = [key for key in leaf_keys() if key not in there and not key.startswith("kinds.")]
    assert not missing
    assert [doc.key for doc in docs if not doc.doc] == []


def test_defaults_and_values_of_a_file_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("ppo: {lr: 1.0e-6, kl: {target: 3}}\n")
    assert config("ppo.lr").startswith("ppo.lr = 3.0e-05\n    number, > 0. ")
    shown = config("ppo", "--config", str(file))
    assert "ppo.lr = 1.0e-06\n" in shown
    assert "ppo.kl.target = 3.0\n" in shown
    assert all(line.startswith(("ppo.", "    ")) for line in shown.splitlines())
    with pytest.raises(ConfigError, match="no such key or section"):
        config("ppo.nonsense")


def test_the_defaults_that_are_printed_are_the_defaults() -> None:
    """Set as overrides they change nothing."""
    defaults = {doc.key: doc.default for doc in key_docs() if "NAME" not in doc.key}
    plain = {k: v for k, v in defaults.items() if k.rpartition(".")[0] not in defaults}
    assert len(plain) > 150
    overrides = [f"{key}={value}" for key, value in plain.items()]
    assert load_config(None, overrides) == load_config(None, [])
