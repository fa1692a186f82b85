"""The errors users meet. Each message names the key, file or row, the value, and what to do."""

import re

LONGEST_MESSAGE = 4000
_HEAD = 3000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class FgaifError(Exception):
    """Base of every error that fgaif raises on purpose.

    Messages show values of files that strangers made: control characters, which could steer a
    terminal, are written out, and the middle of a long message is left out.
    """

    def __init__(self, message: object = "") -> None:
        text = _CONTROL.sub(lambda found: repr(found[0])[1:-1], str(message))
        if len(text) > LONGEST_MESSAGE:
            tail = LONGEST_MESSAGE - _HEAD - 40
            left_out = len(text) - _HEAD - tail
            text = f"{text[:_HEAD]} [{left_out} characters left out] {text[-tail:]}"
        super().__init__(text)


class ConfigError(FgaifError, ValueError):
    """A configuration key is unknown, out of range or contradicts another."""


class DataError(FgaifError, ValueError):
    """A data file, row, column or image cannot be used."""


class CheckpointError(FgaifError, ValueError):
    """A checkpoint is of the wrong architecture, incomplete or does not match its parts."""


class SyncError(FgaifError, RuntimeError):
    """Learner and rollout engine disagree after a weight sync."""


class DivergedError(FgaifError, RuntimeError):
    """A loss is not finite any more: going on from the last checkpoint would end the same."""


class ActorError(FgaifError, RuntimeError):
    """A role died or did not answer; the message gives the first cause."""


class ServiceError(FgaifError, RuntimeError):
    """A model's API cannot be used: key, quota, budget, address; replies so far are kept."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type's name where it has no text."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
