"""A result that is on its way: the one thing the driver knows about remote calls."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")
V = TypeVar("V")


class Pending(Protocol[T_co]):
    """A call that was started. ``result`` waits, and raises what the call raised."""

    def result(self) -> T_co:
        """Wait for the answer."""
        ...


class Ready(Generic[T]):
    """A result that is already there."""

    def __init__(self, value: T) -> None:
        self._value = value

    def result(self) -> T:
        """Return the value."""
        return self._value


class Then(Generic[T]):
    """A result computed on arrival, such as the merge of several replicas' answers."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish = finish

    def result(self) -> T:
        """Wait and compute."""
        return self._finish()


def gather(first: Pending[T], second: Pending[U], third: Pending[V]) -> tuple[T, U, V]:
    """Wait for three calls that run at the same time."""
    return first.result(), second.result(), third.result()
