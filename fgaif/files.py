"""Text files that are whole or not there."""

import json
import os
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


def readable(*paths: Path) -> None:
    """Give files, and those in folders, the rights that other new files have here (the umask's).

    safetensors makes its files for their owner alone, so that nobody else of a group could read the
    weights.
    """
    mask = os.umask(0o022)
    os.umask(mask)
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else (path,):
            if file.is_file() and not file.is_symlink():
                file.chmod(0o666 & ~mask)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, indented; see :func:`write_whole`."""
    write_whole(path, json.dumps(content, indent=2) + "\n")
