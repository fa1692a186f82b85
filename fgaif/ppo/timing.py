"""How long the parts of a PPO step take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Wall seconds of a step's parts; the step begins when this is made.

    ``tokens`` is the number of sampled tokens, for the rate.
    """

    def __init__(self) -> None:
        self.tokens = 0.0
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a block as ``part``."""
        start = time.perf_counter()
        yield
        self._seconds[part] = time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Seconds of each part and in total so far, and tokens per second of the total."""
        total = time.perf_counter() - self._began
        seconds = {f"seconds/{part}": value for part, value in self._seconds.items()}
        return seconds | {"seconds/total": total, "tokens_per_second": self.tokens / total}
