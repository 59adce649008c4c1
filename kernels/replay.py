"""Triton kernel of `fdfo_engine.ops.replay`. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl
from fdfo_engine.kernels.philox import branch_noise, normals


@triton.jit(do_not_specialize=["key_lo", "key_hi"])
def replay_kernel(
    v_ptr, out_ptr, index_ptr, branch_ptr, pair_ptr, last_ptr, wanted_ptr, coefficients_ptr,
    N, T, v_pair, v_branch, v_step, key_lo, key_hi, ANTITHETIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid R * cdiv(N, 4 * BLOCK): x stays in registers from the noise to the last step that is wanted
    per_row = tl.cdiv(tl.cast(N, tl.int64), 4 * BLOCK)
    row, block = tl.program_id(0) // per_row, tl.program_id(0) % per_row
    pair, branch = tl.load(pair_ptr + row), tl.load(branch_ptr + row)
    counter = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    offs = block * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)  # [4 * BLOCK]
    mask = offs < N
    v_ptr += tl.load(index_ptr + row) * v_pair + branch * v_branch
    wanted_ptr += row * (T + 1)
    coefficients_ptr += row * (T + 1) * 3
    x = normals(counter, pair * 0, pair, key_lo, key_hi)
    for k in range(0, tl.load(last_ptr + row) + 1):
        if k > 0:
            v = tl.load(v_ptr + (k - 1) * v_step + offs, mask=mask, other=0.0).to(tl.float32)
            x = x + tl.load(coefficients_ptr + 3 * k) * v
        keep, noise = tl.load(coefficients_ptr + 3 * k + 1), tl.load(coefficients_ptr + 3 * k + 2)
        if (noise != 0) | (keep != 1):
            own, signed = branch_noise(branch, noise, ANTITHETIC)
            x = keep * x + signed * normals(counter, own + (1 + 2 * k), pair, key_lo, key_hi)
        wanted = tl.load(wanted_ptr + k)
        tl.store(out_ptr + wanted * N + offs, x, mask=mask & (wanted >= 0))
