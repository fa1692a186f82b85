"""Signals that interrupt a run: whose handlers stay, and what waits."""

import signal
import threading
from collections.abc import Iterator

import pytest

from fgaif.interrupts import held_back, interrupt_on_sigterm, kept_handlers


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt_on_sigterm()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_interrupts_whatever_handlers_a_library_brings() -> None:
    with kept_handlers():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_an_interruption_comes_after_the_block_and_an_error_in_it_comes_first() -> None:
    done = []

    def work(number: int, error: Exception | None = None) -> None:
        with held_back("this"):
            signal.raise_signal(number)
            done.append(number)
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        work(signal.SIGTERM)
    with pytest.raises(ValueError, match="its own"):
        work(signal.SIGINT, ValueError("its own"))
    assert done == [signal.SIGTERM, signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):  # the handlers of before are back
        signal.raise_signal(signal.SIGINT)


def test_what_was_ignored_stays_ignored() -> None:
    """As for a job in a shell's background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_back("this"):
        signal.raise_signal(signal.SIGINT)


def test_other_threads_leave_the_handlers_alone() -> None:
    found = []

    def work() -> None:
        with kept_handlers(), held_back("this"):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
