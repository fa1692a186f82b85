"""An actor that works as told; imports little, so that it starts fast."""

import os
import time

from actors.progress import advance


class Beater:
    """Makes progress, or none."""

    def __init__(self, greeting: str) -> None:
        self._greeting = greeting

    def work(self, tokens: int) -> str:
        advance(tokens)
        return f"{self._greeting} {tokens}"

    def hang(self, seconds: float) -> None:
        time.sleep(seconds)

    def pid(self) -> int:
        return os.getpid()
