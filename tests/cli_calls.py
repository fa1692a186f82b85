"""``fgaif eval`` called in the test's own process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli.main import main


@pytest.fixture(name="run")
def eval_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Call ``fgaif eval`` in an empty folder: exit code, standard output and error in one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fgaif", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err.replace("\n", " ")

    return call
