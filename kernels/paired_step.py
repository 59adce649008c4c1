"""Triton kernel of `fdfo_engine.ops.paired_step`. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl
from fdfo_engine.kernels.philox import branch_noise, normals, rounded


@triton.jit(do_not_specialize=["stream", "key_lo", "key_hi"])
def paired_step_kernel(
    x_ptr, v_ptr, uncond_ptr, v_out_ptr, out_ptr, pair_ptr, coefficients_ptr, N,
    x_pair, x_branch, v_pair, v_branch, uncond_pair, uncond_branch, v_out_pair, v_out_branch, out_pair, out_branch,
    guidance_scale, stream, key_lo, key_hi,
    GUIDED: tl.constexpr, KEEP_V: tl.constexpr, ANTITHETIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid 2P * cdiv(N, 4 * BLOCK): row 2 * pair + branch; `stream` is branch 0's
    per_row = tl.cdiv(tl.cast(N, tl.int64), 4 * BLOCK)
    row, block = tl.program_id(0) // per_row, tl.program_id(0) % per_row
    pair, branch = row // 2, row % 2
    offs = block * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)  # [4 * BLOCK]
    mask = offs < N
    v = tl.load(v_ptr + pair * v_pair + branch * v_branch + offs, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        at = pair * uncond_pair + branch * uncond_branch
        uncond = tl.load(uncond_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        v = rounded(uncond + guidance_scale * (v - uncond), v_ptr.dtype.element_ty)
    if KEEP_V:
        tl.store(v_out_ptr + pair * v_out_pair + branch * v_out_branch + offs, v, mask=mask)
    move, keep = tl.load(coefficients_ptr + 3 * pair), tl.load(coefficients_ptr + 3 * pair + 1)
    noise = tl.load(coefficients_ptr + 3 * pair + 2)
    x = tl.load(x_ptr + pair * x_pair + branch * x_branch + offs, mask=mask, other=0.0) + move * v
    if (noise != 0) | (keep != 1):
        counter = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        own, signed = branch_noise(branch, noise, ANTITHETIC)
        x = keep * x + signed * normals(counter, own + stream, tl.load(pair_ptr + pair), key_lo, key_hi)
    tl.store(out_ptr + pair * out_pair + branch * out_branch + offs, x, mask=mask)
