"""The holes that large tensors leave between small objects that stay."""

import platform
import subprocess
import sys

import pytest

HOLES = """
import ctypes
from fdfo_engine.runtime.heap import trim_heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

large, small = [], []
for _ in range(4000):  # below the size from which the allocator asks the system for each
    large.append(libc.malloc(100_000))
    ctypes.memset(large[-1], 1, 100_000)
    small.append(libc.malloc(100))
for block in large:
    libc.free(block)
before = resident_mb()
trim_heap()
print(before - resident_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_holes_that_are_more_than_what_is_used_go_back_to_the_system():
    words = [sys.executable, "-c", HOLES]
    given_back = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert given_back > 0.8 * 4000 * 100_000 / 2**20
