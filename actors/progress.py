"""How far this process has come: a counter that moves while work goes on, and stops when it hangs.

An actor's inner loop calls :func:`advance`; a thread beside it reads :func:`count` and sends it on.
The unit is a token of a response: sampled, scored, evaluated or trained on.
"""

_count = 0


def advance(amount: int = 1) -> None:
    """Note progress by ``amount`` tokens. For the one thread that works in an actor's process."""
    global _count
    _count += amount


def count() -> int:
    """Progress since the process started; only differences mean anything."""
    return _count
