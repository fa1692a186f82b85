"""A rollout engine without a model that dies, hangs or disagrees when told to by a file."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fgaif.errors import DataError
from fgaif.types import LoadedWeights, Response, WeightsManifest


class MortalEngine:
    """Doubles numbers; ``FOLDER/NAME.die`` and the like hold how often it does what they say."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._version = 0
        with (folder / f"{name}.started").open("a") as file:
            file.write("x")
        (folder / f"{name}.pid").write_text(str(os.getpid()))
        if self._told("break"):
            raise DataError(f"{name} does not start")
        if self._told("hang-starting"):
            self._sleep(60)

    def generate(self, items: Sequence[int]) -> list[tuple[int, int]]:
        """Items doubled, with the version that did it."""
        if -1 in items or self._told("die"):
            self._die()
        if self._told("hang"):
            self._sleep(60)
        if -13 in items:
            raise DataError("-13 is not doubled")
        self._sleep(0.05)
        return [(2 * item, self._version) for item in items]

    def load_weights(
        self, manifest: WeightsManifest, probe: Sequence[Response] = ()
    ) -> LoadedWeights:
        if self._told("die-loading"):
            self._die()
        self._version = manifest.version
        scores = np.full(2, float(self._version + self._told("differ")), np.float32)
        return LoadedWeights(version=self._version - self._told("stale"), logprobs=(scores,))

    def _die(self) -> None:
        os._exit(1)

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _told(self, what: str) -> bool:
        path = self._folder / f"{self._name}.{what}"
        if not path.exists():
            return False
        left = path.read_text()[1:]
        path.write_text(left) if left else path.unlink()
        return True
