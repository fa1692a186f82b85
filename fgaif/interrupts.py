"""Ctrl-C and SIGTERM end a run in the same way, and wait for what must not be cut in two."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def interrupt_on_sigterm() -> None:
    """Let SIGTERM raise KeyboardInterrupt in this process, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Put the handlers of before in their places again after the block.

    Ray and its native part bring their own for SIGTERM, which end a driver without a word or with
    a dump. Handlers that are not Python's are left as they are.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handler)


@contextmanager
def held_back(what: str) -> Iterator[None]:
    """Let an interruption wait until the block has ended; a second one does not wait.

    Args:
        what: is waited for, in a few words.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach that one alone
        yield
        return
    came: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        log.warning("interrupted: waiting for %s to end; once more to stop at once", what)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
