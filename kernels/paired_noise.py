"""Triton kernel of `fdfo_engine.ops.paired_noise`. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl
from fdfo_engine.kernels.philox import branch_noise, normals


@triton.jit(do_not_specialize=["key_lo", "key_hi"])
def paired_noise_kernel(
    pair_ptr, coefficients_ptr, out_ptr, N, key_lo, key_hi, ANTITHETIC: tl.constexpr, BLOCK: tl.constexpr
):
    # grid P * cdiv(N, 4 * BLOCK): a program makes the shared noise once and writes it into both branches
    per_row = tl.cdiv(tl.cast(N, tl.int64), 4 * BLOCK)
    row, block = tl.program_id(0) // per_row, tl.program_id(0) % per_row
    pair = tl.load(pair_ptr + row)
    keep, noise = tl.load(coefficients_ptr + 3 * row + 1), tl.load(coefficients_ptr + 3 * row + 2)
    counter = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    offs = block * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    shared = normals(counter, pair * 0, pair, key_lo, key_hi)  # [4 * BLOCK], stream 0
    for branch in tl.static_range(2):
        x = shared
        if (noise != 0) | (keep != 1):
            own, signed = branch_noise(pair * 0 + branch, noise, ANTITHETIC)
            x = keep * shared + signed * normals(counter, own + 1, pair, key_lo, key_hi)
        tl.store(out_ptr + (2 * row + branch) * N + offs, x, mask=offs < N)
