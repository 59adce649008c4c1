"""Triton kernel of `fdfo_engine.ops.philox_normal`. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl
from fdfo_engine.kernels.philox import normals


@triton.jit(do_not_specialize=["key_lo", "key_hi"])  # else a new kernel a seed, and none for a word of 1
def philox_normal_kernel(pair_ptr, stream_ptr, out_ptr, N, key_lo, key_hi, BLOCK: tl.constexpr):
    # grid P * cdiv(N, 4 * BLOCK): a program writes 4 * BLOCK normals of one pair, from BLOCK counters
    per_row = tl.cdiv(tl.cast(N, tl.int64), 4 * BLOCK)
    row, block = tl.program_id(0) // per_row, tl.program_id(0) % per_row
    counter = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    n = normals(counter, tl.load(stream_ptr + row), tl.load(pair_ptr + row), key_lo, key_hi)  # [4 * BLOCK]
    offs = block * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + row * N + offs, n, mask=offs < N)
