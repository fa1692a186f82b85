"""Files are whole or not there."""

import json
from pathlib import Path

import pytest

from fgaif.errors import DataError
from fgaif.files import write_json, write_whole


def test_half_a_character_is_written_as_json_writes_it(tmp_path: Path) -> None:
    text = "cut \ud83d, whole \N{CAT FACE}"
    write_whole(tmp_path / "a.json", json.dumps(text, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == text


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/a\.json: cannot be written: .*; free"):
        write_json(tmp_path / "file" / "a.json", {})
