"""Triton kernels of `fdfo_engine.ops.fdfo_loss`. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl
from fdfo_engine.kernels.philox import rounded


@triton.jit(do_not_specialize=["B"])  # else a new kernel for a batch of 1, and of 16
def fdfo_loss_forward_kernel(
    v_ptr, v_old_ptr, u_ptr, pair_ptr, branch_ptr, advantage_ptr,
    partial_ptr, ticket_ptr, scale_ptr, loss_ptr, log_ratio_ptr,
    B, N, CHUNKS, v_row, v_old_row, u_row, clip_range, normalizer,
    ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (B * CHUNKS): one pair of partial sums a program; the ticket only tells which program comes last, so no
    # value depends on it, and that one turns the sums into rows and the loss in a fixed order
    row = tl.program_id(0).to(tl.int64) // CHUNKS
    chunk = tl.program_id(0).to(tl.int64) % CHUNKS
    offs = chunk * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < N
    v = tl.load(v_ptr + row * v_row + offs, mask=mask, other=0.0).to(tl.float64)
    v_old = tl.load(v_old_ptr + row * v_old_row + offs, mask=mask, other=0.0).to(tl.float64)
    u = tl.load(u_ptr + tl.load(pair_ptr + row) * u_row + offs, mask=mask, other=0.0).to(tl.float64)
    e = v - v_old
    sign = 1.0 - 2.0 * tl.load(branch_ptr + row).to(tl.float64)
    at = partial_ptr + 2 * tl.program_id(0).to(tl.int64)
    tl.store(at, tl.sum(e * e))
    tl.store(at + 1, sign * tl.sum(e * u))
    tl.debug_barrier()  # both are written before the ticket is drawn
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == B * CHUNKS - 1:
        loss = finish(
            partial_ptr, advantage_ptr, scale_ptr, log_ratio_ptr, B, N, CHUNKS, clip_range, normalizer, ROWS, PARTS
        )
        tl.store(loss_ptr, loss.to(tl.float32))
        tl.store(ticket_ptr, 0)


@triton.jit
def finish(
    partial_ptr, advantage_ptr, scale_ptr, log_ratio_ptr, B, N, CHUNKS, clip_range, normalizer,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Writes log-ratio and scale of each row, `dL/dv = scale * (e + u)`; returns the loss."""
    total, n = tl.zeros([ROWS], tl.float64), tl.cast(N, tl.float64)
    for first in range(0, B, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)  # [ROWS]
        live = row < B
        ee, eu = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
        for part in range(0, CHUNKS, PARTS):
            chunk = part + tl.arange(0, PARTS)  # [PARTS]
            mask = live[:, None] & (chunk < CHUNKS)[None, :]
            at = partial_ptr + 2 * (row[:, None] * CHUNKS + chunk[None, :])  # [ROWS, PARTS]
            ee += tl.sum(tl.load(at, mask=mask, other=0.0, volatile=True), axis=1)  # volatile: not from a stale L1
            eu += tl.sum(tl.load(at + 1, mask=mask, other=0.0, volatile=True), axis=1)
        log_ratio = -(ee / n + 2.0 * (eu / n))
        advantage = tl.load(advantage_ptr + row, mask=live, other=0.0).to(tl.float64)
        rho = tl.exp(tl.where(advantage == 0, 0.0, log_ratio))  # masked before exp: 0 * inf would be NaN
        weight = tl.abs(advantage) / clip_range
        slope = -advantage * rho + weight * (rho - 1.0) * rho
        total += -advantage * rho + 0.5 * weight * (rho - 1.0) * (rho - 1.0)
        tl.store(scale_ptr + row, tl.where(rho == 0, 0.0, slope * (-2.0 / n) / normalizer), mask=live)
        tl.store(log_ratio_ptr + row, log_ratio.to(tl.float32), mask=live)
    return tl.sum(total) / normalizer


@triton.jit
def fdfo_loss_backward_kernel(
    v_ptr, v_old_ptr, u_ptr, pair_ptr, branch_ptr, scale_ptr, upstream_ptr, grad_ptr,
    N, v_row, v_old_row, u_row, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid B * cdiv(N, BLOCK)
    per_row = tl.cdiv(tl.cast(N, tl.int64), BLOCK)
    row, chunk = tl.program_id(0) // per_row, tl.program_id(0) % per_row
    offs = chunk * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < N
    scale = (tl.load(scale_ptr + row) * tl.load(upstream_ptr).to(tl.float64)).to(tl.float32)
    v = tl.load(v_ptr + row * v_row + offs, mask=mask, other=0.0).to(tl.float32)
    v_old = tl.load(v_old_ptr + row * v_old_row + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + tl.load(pair_ptr + row) * u_row + offs, mask=mask, other=0.0)
    sign = 1.0 - 2.0 * tl.load(branch_ptr + row).to(tl.float32)
    grad = tl.where(scale == 0, 0.0, scale * (v - v_old + sign * u))  # exactly 0 there: e may be infinite
    tl.store(grad_ptr + row * N + offs, rounded(grad, grad_ptr.dtype.element_ty), mask=mask)
