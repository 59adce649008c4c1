"""Triton kernel of `fdfo_engine.ops.pair_direction`. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl


@triton.jit
def pair_direction_kernel(x_ptr, out_ptr, N, x_pair, x_branch, out_pair, floor, BLOCK: tl.constexpr):
    # grid (P): a program sums its pair and then scales it; the second read comes from the cache
    row = tl.program_id(0).to(tl.int64)
    first, second = x_ptr + row * x_pair, x_ptr + row * x_pair + x_branch
    total = tl.zeros([BLOCK], tl.float64)  # float64, so that the order of the sum can't show in the result
    for begin in range(0, N, BLOCK):
        offs = begin + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        mask = offs < N
        d = (tl.load(first + offs, mask=mask, other=0.0) - tl.load(second + offs, mask=mask, other=0.0)) * 0.5
        total += (d * d).to(tl.float64)
    divisor = (tl.sum(total) / tl.cast(N, tl.float64) + floor).to(tl.float32)
    for begin in range(0, N, BLOCK):
        offs = begin + tl.arange(0, BLOCK).to(tl.int64)
        mask = offs < N
        d = (tl.load(first + offs, mask=mask, other=0.0) - tl.load(second + offs, mask=mask, other=0.0)) * 0.5
        tl.store(out_ptr + row * out_pair + offs, tl.div_rn(d, divisor), mask=mask)
