"""An actor that dies or hangs when told to; imports little, so that it starts fast."""

import os
import time
from pathlib import Path

from fgaif.errors import DataError


class Mortal:
    """Counts in files, which outlive it, how often it was started and told to die."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._version = 0
        self._note("started")

    def double(self, items: list[int]) -> list[tuple[int, int]]:
        """Items doubled, with the version that did it."""
        if (self._folder / f"{self._name}.die").exists():
            self._forget("die")
            os._exit(1)
        if (self._folder / f"{self._name}.hang").exists():
            self._forget("hang")
            time.sleep(60)
        if 13 in items:
            raise DataError("13 is not doubled")
        return [(2 * item, self._version) for item in items]

    def load_weights(self, manifest: int) -> int:
        self._version = manifest
        return manifest

    def _note(self, what: str) -> None:
        with (self._folder / f"{self._name}.{what}").open("a") as file:
            file.write("x")

    def _forget(self, what: str) -> None:
        path = self._folder / f"{self._name}.{what}"
        left = path.read_text()[1:]
        path.write_text(left) if left else path.unlink()
