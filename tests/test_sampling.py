"""Sampling in rounds: answers in order, from however many engines there are by then."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from cluster.pipeline.sample import sample_in_rounds
from fgaif.pending import Then


class Engines:
    """Answers numbers by themselves and notes what is asked and taken; a third engine comes late.

    With ``scale`` it is seen after the second round was asked for.
    """

    def __init__(self, scale: bool) -> None:
        self._scale = scale
        self.events: list[str] = []
        self.chunks: list[list[int]] = []

    def number(self) -> int:
        return 3 if self._scale and len(self.events) > 2 else 1

    def generate(self, items: Sequence[int], *, chunk: int) -> Then[list[int]]:
        self.events.append(f"ask {len(items)}")
        self.chunks += [list(items[i : i + chunk]) for i in range(0, len(items), chunk)]
        return Then(lambda: self._answer(list(items)))

    def _answer(self, items: list[int]) -> list[int]:
        self.events.append(f"take {len(items)}")
        return items


def sample(engines: Any, count: int) -> list[Any]:
    items: Any = list(range(count))
    return list(chain.from_iterable(sample_in_rounds(engines, items, engines.number)))


def test_a_round_is_asked_for_ahead_and_grows_with_the_engines() -> None:
    engines = Engines(scale=True)
    assert sample(engines, 1500) == list(range(1500))
    assert engines.events == [
        "ask 256", "ask 256", "take 256", "ask 768", "take 256", "ask 220", "take 768", "take 220",
    ]  # fmt: skip


def test_calls_are_the_same_whatever_the_number_of_engines() -> None:
    one, three = Engines(scale=False), Engines(scale=True)
    assert sample(one, 1500) == sample(three, 1500)
    assert one.chunks == three.chunks
    assert sample(one, 0) == []
