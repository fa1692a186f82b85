"""How the C library keeps freed memory, set to what the model in this process needs."""

import ctypes

LARGE = 10_000_000
"""Parameters from which tensors are worth giving back."""
_TOP_PAD, _KEPT = 2**26, 2**30
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # malloc.h


def set_allocator(parameters: int) -> None:
    """Say what glibc does with freed tensors, for a process whose model has so many parameters.

    A large model's are given back: glibc begins with that from 128 KiB on, but raises the limit to
    32 MiB as it sees blocks come and go. In its heap aligned blocks leave gaps that fit no other:
    training held twice the memory of its tensors.

    A small model's are kept: its tensors of a few MiB come and go faster than the system makes
    pages, which were an eighth of a PPO step's time. Up to 1 GiB of freed heap stays.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # other C libraries have none
        return
    if parameters >= LARGE:
        mallopt(_M_MMAP_MAX, 2**16)  # glibc's own, as the next: a small model may have come before
        mallopt(_M_TOP_PAD, 2**17)
        mallopt(_M_MMAP_THRESHOLD, 2**17)
        mallopt(_M_TRIM_THRESHOLD, 2**24)
    else:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_TOP_PAD, _TOP_PAD)
