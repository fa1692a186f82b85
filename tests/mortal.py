"""An actor with a state that dies, hangs or raises when told to; imports little, starts fast."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fgaif.errors import DataError

T = TypeVar("T")


def tell(folder: Path, name: str, what: str, method: str, times: int = 1) -> None:
    """Have actor ``name`` do ``what`` at its next ``times`` calls of ``method``.

    ``die``: before the work; ``die-after``: when the work is done and not yet answered; ``hang``;
    ``echo``: raise RuntimeError, as one does whose fellow died in a collective.
    """
    (folder / f"{name}.{what}.{method}").write_text("x" * times)


def starts(folder: Path, name: str) -> int:
    """How often actor ``name`` was started."""
    return len((folder / f"{name}.started").read_text())


class Mortal:
    """``add`` multiplies the state by 10 and adds, so that the state shows all calls in order.

    Orders come and starts are noted in files, which outlive it. With ``world`` > 1 ranks meet at
    every ``add``, under the token they were made with; who waits for a dead fellow waits for ever.
    """

    def __init__(
        self, folder: Path, name: str, rank: int = 0, world: int = 1, token: str = ""
    ) -> None:
        self._folder, self._name = folder, name
        self._rank, self._world, self._token = rank, world, token
        self._total = 0
        self._meetings = 0
        with (folder / f"{name}.started").open("a") as file:
            file.write("x")
        self._obey("start", lambda: None)

    def add(self, digit: int) -> int:
        """Change the state and return it."""
        return self._obey("add", lambda: self._add(digit))

    def read(self) -> int:
        """The state."""
        return self._obey("read", lambda: self._total)

    def double(self, items: list[int]) -> list[int]:
        """Items doubled."""
        return self._obey("double", lambda: [self._double(item) for item in items])

    def save(self, path: Path) -> None:
        """Write the state."""
        self._obey("save", lambda: path.write_text(str(self._total)) and None)

    def restore(self, path: Path) -> None:
        """Read the state."""
        self._obey("restore", lambda: self._set(int(path.read_text())))

    def pid(self) -> int:
        """Its process."""
        return os.getpid()

    def _add(self, digit: int) -> int:
        if digit < 0:
            self._total += 1  # half of the change is done
            raise DataError(f"{digit} is not a digit")
        if self._world > 1:
            self._meet()
        self._total = 10 * self._total + digit
        return self._total

    def _meet(self) -> None:
        self._meetings += 1
        here = f"{self._token}.{self._meetings}."
        (self._folder / f"{here}{self._rank}").touch()
        while not all((self._folder / f"{here}{rank}").exists() for rank in range(self._world)):
            self._sleep(0.01)

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _double(self, item: int) -> int:
        if item == 13:
            raise DataError("13 is not doubled")
        return 2 * item

    def _set(self, total: int) -> None:
        self._total = total

    def _obey(self, method: str, work: Callable[[], T]) -> T:
        if self._told("die", method):
            print(f"{self._name}: the last words", file=sys.stderr, flush=True)
            self._die()
        if self._told("hang", method):
            self._sleep(600)
        if self._told("late", method):
            self._sleep(0.5)
            self._die()
        if self._told("echo", method):
            raise RuntimeError("Connection closed by peer")
        answer = work()
        if self._told("die-after", method):
            self._die()
        return answer

    def _told(self, what: str, method: str) -> bool:
        path = self._folder / f"{self._name}.{what}.{method}"
        if not path.exists():
            return False
        left = path.read_text()[1:]
        path.write_text(left) if left else path.unlink()
        return True
