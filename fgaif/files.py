"""Text files that are whole or not there."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text aside, then rename it into place: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
