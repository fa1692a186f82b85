"""How the C library keeps freed memory, set to what large models on the CPU need."""

import ctypes

LARGE = 10_000_000
"""Parameters from which tensors are worth giving back."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def return_freed_tensors(parameters: int) -> None:
    """With a model of so many parameters, let glibc give freed tensors of 128 KiB and more back.

    That is where glibc begins, but it raises the limit to 32 MiB as it sees blocks come and go. In
    its heap aligned blocks leave gaps that fit no other: training held twice the memory of its
    tensors. Small models, whose tensors come and go faster than the system makes pages, are better
    off with the heap, and are left to it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and parameters >= LARGE:  # other C libraries have none
        mallopt(_M_MMAP_THRESHOLD, 2**17)
        mallopt(_M_TRIM_THRESHOLD, 2**24)
