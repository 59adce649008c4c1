"""Triton kernels of `fdfo_engine.ops.layer_norm_modulate`, with or without a gated residual before the norm.

Device code: imports triton only, never the engine.
"""

import triton
import triton.language as tl
from fdfo_engine.kernels.philox import rounded


@triton.jit(do_not_specialize=["B"])
def layer_norm_modulate_forward_kernel(
    xs, ys, gates, scales, shifts, scale2s, shift2s, statistics, x_news, outs, out2s, B, Ss, D,
    x_samples, x_tokens, y_samples, y_tokens, gate_rows, scale_rows, shift_rows, scale2_rows, shift2_rows, eps,
    STREAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (the sum of B * S over streams): one token a program, its elements in registers; tuples hold one of a stream
    row, first_rows = tl.program_id(0).to(tl.int64), B * Ss[0]
    for i in tl.static_range(STREAMS):
        if (row < first_rows) == (i == 0):
            forward_of(
                row - i * first_rows, xs[i], ys[i], gates[i], scales[i], shifts[i], scale2s[i], shift2s[i],
                statistics[i], x_news[i], outs[i], out2s[i], Ss[i], D, x_samples[i], x_tokens[i], y_samples[i],
                y_tokens[i], gate_rows[i], scale_rows[i], shift_rows[i], scale2_rows[i], shift2_rows[i], eps, BLOCK,
            )  # fmt: skip


@triton.jit
def forward_of(
    row, x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, scale2_ptr, shift2_ptr, statistics_ptr, x_new_ptr, out_ptr,
    out2_ptr, S, D, x_sample, x_token, y_sample, y_token, gate_row, scale_row, shift_row, scale2_row, shift2_row, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: with a residual where there is a gate, and with what else has an address."""
    sample, token = row // S, row % S
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < D
    x = read(x_ptr + sample * x_sample + token * x_token, offs, mask)
    if gate_ptr is not None:
        y = read(y_ptr + sample * y_sample + token * y_token, offs, mask)
        x = rounded(x + read(gate_ptr + sample * gate_row, offs, mask) * y, x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + row * D + offs, x, mask=mask)
    mean = tl.sum(x) / D
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred) / D + eps)
    if statistics_ptr is not None:
        tl.store(statistics_ptr + 2 * row, mean)
        tl.store(statistics_ptr + 2 * row + 1, rstd)
    normed = centred * rstd
    scale = read(scale_ptr + sample * scale_row, offs, mask)
    write(out_ptr + row * D, offs, mask, normed * (1.0 + scale) + read(shift_ptr + sample * shift_row, offs, mask))
    if scale2_ptr is not None:
        scale = read(scale2_ptr + sample * scale2_row, offs, mask)
        shift = read(shift2_ptr + sample * shift2_row, offs, mask)
        write(out2_ptr + row * D, offs, mask, normed * (1.0 + scale) + shift)


@triton.jit(do_not_specialize=["B"])
def layer_norm_modulate_backward_kernel(
    xs, ys, gates, scales, scale2s, statistics, upstreams, upstream2s, upstream_xs, dxs, dys, partials, kinds, B, Ss, D,
    x_samples, x_tokens, y_samples, y_tokens, gate_rows, scale_rows, scale2_rows, up_samples, up_tokens,
    up2_samples, up2_tokens, up_x_samples, up_x_tokens,
    STREAMS: tl.constexpr, SUM_MODULATIONS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (the sum of B * cdiv(S, TOKENS) over streams): a program walks TOKENS tokens of a sample, and keeps their
    # sums in registers
    program, first_programs = tl.program_id(0).to(tl.int64), B * tl.cdiv(Ss[0], TOKENS)
    for i in tl.static_range(STREAMS):
        if (program < first_programs) == (i == 0):
            backward_of(
                program - i * first_programs, xs[i], ys[i], gates[i], scales[i], scale2s[i], statistics[i],
                upstreams[i], upstream2s[i], upstream_xs[i], dxs[i], dys[i], partials[i], kinds[i], Ss[i], D,
                x_samples[i], x_tokens[i], y_samples[i], y_tokens[i], gate_rows[i], scale_rows[i], scale2_rows[i],
                up_samples[i], up_tokens[i], up2_samples[i], up2_tokens[i], up_x_samples[i], up_x_tokens[i],
                SUM_MODULATIONS, TOKENS, BLOCK,
            )  # fmt: skip


@triton.jit
def backward_of(
    program, x_ptr, y_ptr, gate_ptr, scale_ptr, scale2_ptr, statistics_ptr, upstream_ptr, upstream2_ptr, upstream_x_ptr,
    dx_ptr, dy_ptr, partial_ptr, kinds, S, D, x_sample, x_token, y_sample, y_token, gate_row, scale_row, scale2_row,
    up_sample, up_token, up2_sample, up2_token, up_x_sample, up_x_token,
    SUM_MODULATIONS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of a stream; `partial` gets those sums of scale, shift, scale2, shift2 and gate that are needed:
    `kinds` in number.
    """
    blocks = tl.cdiv(S, TOKENS)
    sample, first = program // blocks, program % blocks * TOKENS
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < D
    d_scale, d_shift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    d_scale2, d_shift2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    d_gate = tl.zeros([BLOCK], tl.float32)
    for token in range(first, tl.minimum(first + TOKENS, S)):
        row = sample * S + token
        x = read(x_ptr + sample * x_sample + token * x_token, offs, mask)
        mean, rstd = tl.load(statistics_ptr + 2 * row), tl.load(statistics_ptr + 2 * row + 1)
        normed = tl.where(mask, (x - mean) * rstd, 0.0)
        upstream = read(upstream_ptr + sample * up_sample + token * up_token, offs, mask)
        inner = upstream * (1.0 + read(scale_ptr + sample * scale_row, offs, mask))
        if SUM_MODULATIONS:
            d_scale += upstream * normed
            d_shift += upstream
        if upstream2_ptr is not None:
            upstream = read(upstream2_ptr + sample * up2_sample + token * up2_token, offs, mask)
            inner += upstream * (1.0 + read(scale2_ptr + sample * scale2_row, offs, mask))
            if SUM_MODULATIONS:
                d_scale2 += upstream * normed
                d_shift2 += upstream
        d = rstd * (inner - tl.sum(inner) / D - normed * (tl.sum(inner * normed) / D))
        if upstream_x_ptr is not None:
            d += read(upstream_x_ptr + sample * up_x_sample + token * up_x_token, offs, mask)
        write(dx_ptr + row * D, offs, mask, d)
        if gate_ptr is not None:
            write(dy_ptr + row * D, offs, mask, read(gate_ptr + sample * gate_row, offs, mask) * d)
        if y_ptr is not None:
            d_gate += d * read(y_ptr + sample * y_sample + token * y_token, offs, mask)
    partial_ptr += program * D * kinds
    if SUM_MODULATIONS:
        tl.store(partial_ptr + offs, d_scale, mask=mask)
        tl.store(partial_ptr + D + offs, d_shift, mask=mask)
        partial_ptr += 2 * D
        if upstream2_ptr is not None:
            tl.store(partial_ptr + offs, d_scale2, mask=mask)
            tl.store(partial_ptr + D + offs, d_shift2, mask=mask)
            partial_ptr += 2 * D
    if y_ptr is not None:
        tl.store(partial_ptr + offs, d_gate, mask=mask)


@triton.jit
def read(row_ptr, offs, mask):
    """Elements of a row as float32, 0 past its end."""
    return tl.load(row_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(row_ptr, offs, mask, values):
    """Stores float32 `values`, rounded to the type of the row."""
    tl.store(row_ptr + offs, rounded(values, row_ptr.dtype.element_ty), mask=mask)
