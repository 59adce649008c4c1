"""Triton kernels of `fdfo_engine.ops.gated_residual`. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl
from fdfo_engine.kernels.layer_norm_modulate import read, write


@triton.jit
def gated_residual_forward_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr, S, D, x_sample, x_token, y_sample, y_token, gate_row, BLOCK: tl.constexpr
):
    # grid (B * S): one token a program
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // S, row % S
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < D
    x = read(x_ptr + sample * x_sample + token * x_token, offs, mask)
    y = read(y_ptr + sample * y_sample + token * y_token, offs, mask)
    write(out_ptr + row * D, offs, mask, x + read(gate_ptr + sample * gate_row, offs, mask) * y)


@triton.jit
def gated_residual_backward_kernel(
    upstream_ptr, y_ptr, gate_ptr, dy_ptr, partial_ptr, S, D, up_sample, up_token, y_sample, y_token, gate_row,
    DY: tl.constexpr, SUM_GATE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (B * cdiv(S, TOKENS)): a program walks TOKENS tokens of a sample, and keeps their sum in registers
    blocks = tl.cdiv(S, TOKENS)
    sample = tl.program_id(0).to(tl.int64) // blocks
    first = tl.program_id(0) % blocks * TOKENS
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < D
    d_gate = tl.zeros([BLOCK], tl.float32)
    for token in range(first, tl.minimum(first + TOKENS, S)):
        at = tl.cast(token, tl.int64)
        upstream = read(upstream_ptr + sample * up_sample + at * up_token, offs, mask)
        if DY:
            gate = read(gate_ptr + sample * gate_row, offs, mask)
            write(dy_ptr + (sample * S + token) * D, offs, mask, gate * upstream)
        if SUM_GATE:
            d_gate += upstream * read(y_ptr + sample * y_sample + at * y_token, offs, mask)
    if SUM_GATE:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + offs, d_gate, mask=mask)
