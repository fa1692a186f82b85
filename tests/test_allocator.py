"""Where blocks of a few MiB are taken from, in a process of its own: the setting is for good."""

import ctypes
import subprocess
import sys

import pytest

from fgaif.lvlm.allocator import LARGE

PROGRAM = """
import ctypes
from fgaif.lvlm.allocator import set_allocator

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.mallinfo2.restype = [ctypes.c_void_p], Info
for parameters in {models}:
    set_allocator(parameters)
libc.free(libc.malloc(2**24))  # teaches glibc to keep blocks of this size
before = libc.mallinfo2().hblks
libc.malloc(2**22)
outside = libc.mallinfo2().hblks - before
libc.free(libc.malloc(2**26))  # more than glibc ever keeps by itself
print(outside, int(libc.mallinfo2().fordblks >= 2**26))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="another C library")
@pytest.mark.parametrize(
    ("models", "found"), [([LARGE - 1], "0 1"), ([LARGE], "1 0"), ([LARGE - 1, LARGE], "1 0")]
)
def test_freed_tensors_of_small_models_are_kept_and_of_large_ones_are_not(
    models: list[int], found: str
) -> None:
    program = PROGRAM.format(models=models)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == found
