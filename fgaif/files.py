"""Text files that are whole or not there."""

import json
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text aside, then rename it into place: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, indented; see :func:`write_whole`."""
    write_whole(path, json.dumps(content, indent=2) + "\n")
