"""Triton kernels of `fdfo_engine.ops.layer_norm_modulate`, with or without a gated residual before the norm.

Device code: imports triton only, never the engine.
"""

import triton
import triton.language as tl
from fdfo_engine.kernels.philox import rounded


@triton.jit
def layer_norm_modulate_forward_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, scale2_ptr, shift2_ptr, statistics_ptr, x_new_ptr, out_ptr, out2_ptr,
    S, D, x_sample, x_token, y_sample, y_token, gate_row, scale_row, shift_row, scale2_row, shift2_row, eps,
    RESIDUAL: tl.constexpr, SECOND: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (B * S): one token a program, its elements in registers
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // S, row % S
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < D
    x = read(x_ptr + sample * x_sample + token * x_token, offs, mask)
    if RESIDUAL:
        y = read(y_ptr + sample * y_sample + token * y_token, offs, mask)
        x = rounded(x + read(gate_ptr + sample * gate_row, offs, mask) * y, x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + row * D + offs, x, mask=mask)
    mean = tl.sum(x) / D
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred) / D + eps)
    if KEEP:
        tl.store(statistics_ptr + 2 * row, mean)
        tl.store(statistics_ptr + 2 * row + 1, rstd)
    normed = centred * rstd
    scale = read(scale_ptr + sample * scale_row, offs, mask)
    write(out_ptr + row * D, offs, mask, normed * (1.0 + scale) + read(shift_ptr + sample * shift_row, offs, mask))
    if SECOND:
        scale = read(scale2_ptr + sample * scale2_row, offs, mask)
        shift = read(shift2_ptr + sample * shift2_row, offs, mask)
        write(out2_ptr + row * D, offs, mask, normed * (1.0 + scale) + shift)


@triton.jit
def layer_norm_modulate_backward_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, scale2_ptr, statistics_ptr, upstream_ptr, upstream2_ptr, upstream_x_ptr,
    dx_ptr, dy_ptr, partial_ptr,
    S, D, x_sample, x_token, y_sample, y_token, gate_row, scale_row, scale2_row, up_sample, up_token,
    up2_sample, up2_token, up_x_sample, up_x_token,
    RESIDUAL: tl.constexpr, SECOND: tl.constexpr, UPSTREAM_X: tl.constexpr, SUM_MODULATIONS: tl.constexpr,
    SUM_GATE: tl.constexpr, KINDS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (B * cdiv(S, TOKENS)): a program walks TOKENS tokens of a sample, and keeps their sums in registers
    blocks = tl.cdiv(S, TOKENS)
    sample = tl.program_id(0).to(tl.int64) // blocks
    first = tl.program_id(0) % blocks * TOKENS
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < D
    d_scale, d_shift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    d_scale2, d_shift2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    d_gate = tl.zeros([BLOCK], tl.float32)
    for token in range(first, tl.minimum(first + TOKENS, S)):
        row = sample * S + token
        at = tl.cast(token, tl.int64)
        x = read(x_ptr + sample * x_sample + at * x_token, offs, mask)
        mean, rstd = tl.load(statistics_ptr + 2 * row), tl.load(statistics_ptr + 2 * row + 1)
        normed = tl.where(mask, (x - mean) * rstd, 0.0)
        upstream = read(upstream_ptr + sample * up_sample + at * up_token, offs, mask)
        inner = upstream * (1.0 + read(scale_ptr + sample * scale_row, offs, mask))
        if SUM_MODULATIONS:
            d_scale += upstream * normed
            d_shift += upstream
        if SECOND:
            upstream = read(upstream2_ptr + sample * up2_sample + at * up2_token, offs, mask)
            inner += upstream * (1.0 + read(scale2_ptr + sample * scale2_row, offs, mask))
            if SUM_MODULATIONS:
                d_scale2 += upstream * normed
                d_shift2 += upstream
        d = rstd * (inner - tl.sum(inner) / D - normed * (tl.sum(inner * normed) / D))
        if UPSTREAM_X:
            d += read(upstream_x_ptr + sample * up_x_sample + at * up_x_token, offs, mask)
        write(dx_ptr + row * D, offs, mask, d)
        if RESIDUAL:
            write(dy_ptr + row * D, offs, mask, read(gate_ptr + sample * gate_row, offs, mask) * d)
        if SUM_GATE:
            d_gate += d * read(y_ptr + sample * y_sample + at * y_token, offs, mask)
    partial_ptr += tl.program_id(0).to(tl.int64) * KINDS * D
    if SUM_MODULATIONS:
        tl.store(partial_ptr + offs, d_scale, mask=mask)
        tl.store(partial_ptr + D + offs, d_shift, mask=mask)
        if SECOND:
            tl.store(partial_ptr + 2 * D + offs, d_scale2, mask=mask)
            tl.store(partial_ptr + 3 * D + offs, d_shift2, mask=mask)
    if SUM_GATE:
        tl.store(partial_ptr + (KINDS - 1) * D + offs, d_gate, mask=mask)


@triton.jit
def read(row_ptr, offs, mask):
    """Elements of a row as float32, 0 past its end."""
    return tl.load(row_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(row_ptr, offs, mask, values):
    """Stores float32 `values`, rounded to the type of the row."""
    tl.store(row_ptr + offs, rounded(values, row_ptr.dtype.element_ty), mask=mask)
