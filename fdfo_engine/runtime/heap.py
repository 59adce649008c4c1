"""Host memory that the allocator keeps: large tensors leave holes between the small objects that stay."""

from __future__ import annotations

import ctypes


class _Counts(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later; of these numbers two are read here."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keepcost")
    ]  # fmt: skip


def trim_heap() -> None:
    """Gives the holes back to the system once they are more than what is in use; nothing but with glibc.

    A training process would else grow by a megabyte an epoch for hours, although what it uses does not.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return
    libc.mallinfo2.restype = _Counts
    counts = libc.mallinfo2()
    if counts.free > counts.used:
        libc.malloc_trim(ctypes.c_size_t(0))
