"""Elements of tuple arguments, chosen while a kernel runs. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl


@triton.jit
def pointer_of(pointers, i, COUNT: tl.constexpr):
    """Pointer i of a tuple of COUNT, all of one type."""
    found = pointers[0]
    for j in tl.static_range(1, COUNT):
        if i == j:
            found = pointers[j]
    return found


@triton.jit
def size_of(sizes, i, COUNT: tl.constexpr, dtype: tl.constexpr = tl.int32):
    """Integer i of a tuple of COUNT; Triton makes a constant of each that is 1."""
    found = tl.cast(sizes[0], dtype)
    for j in tl.static_range(1, COUNT):
        found = tl.where(i == j, tl.cast(sizes[j], dtype), found)
    return found


@triton.jit
def scale_of(scales, i, COUNT: tl.constexpr):
    """Number i of a tuple."""
    found = tl.cast(scales[0], tl.float32)
    for j in tl.static_range(1, COUNT):
        found = tl.where(i == j, tl.cast(scales[j], tl.float32), found)
    return found
