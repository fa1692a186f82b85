"""Text files that are whole or not there."""

import json
from pathlib import Path
from typing import Any

from fgaif.errors import DataError


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text aside, then rename it into place: a reader never sees half a file.

    Half a character (a lone surrogate, as models and cut files hold them) is written as the escape
    that JSON has for it.

    Raises:
        DataError: the disk is full or the folder cannot be written; an older file stays.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        aside.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror}; free some space or correct its rights"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, indented; see :func:`write_whole`."""
    write_whole(path, json.dumps(content, indent=2) + "\n")
