"""Triton kernels of `fdfo_engine.ops.qk_rms_norm`. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl
from fdfo_engine.kernels.philox import rounded


@triton.jit
def qk_rms_norm_forward_kernel(
    q0_ptr, k0_ptr, v0_ptr, q1_ptr, k1_ptr, v1_ptr, q0_weight_ptr, k0_weight_ptr, q1_weight_ptr, k1_weight_ptr,
    q_ptr, k_ptr, v_ptr, roots_ptr, cos_ptr, sin_ptr,
    B, TOKENS0, TOKENS1, HEADS, batch0, token0, batch1, token1, eps,
    NORMED: tl.constexpr, ROTARY: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # grid (cdiv(B * TOKENS0 * HEADS, ROWS) + cdiv(B * TOKENS1 * HEADS, ROWS), 3 or 2): heads of q, k and v; roots, if
    # there, get 1 / rms of each packed head, [2, B, TOKENS0 + TOKENS1, HEADS]
    kind, first_blocks = tl.program_id(1), tl.cdiv(B * TOKENS0 * HEADS, ROWS)
    second = tl.program_id(0) >= first_blocks
    block = tl.program_id(0) - tl.where(second, first_blocks, 0)
    tokens, x_batch, x_token = of_stream(second, TOKENS0, TOKENS1, batch0, batch1, token0, token1)
    if second:
        x_ptr, weight_ptr = q1_ptr, q1_weight_ptr
        if kind == 1:
            x_ptr, weight_ptr = k1_ptr, k1_weight_ptr
        elif kind == 2:
            x_ptr = v1_ptr
    else:
        x_ptr, weight_ptr = q0_ptr, q0_weight_ptr
        if kind == 1:
            x_ptr, weight_ptr = k0_ptr, k0_weight_ptr
        elif kind == 2:
            x_ptr = v0_ptr
    out_ptr = q_ptr
    if kind == 1:
        out_ptr = k_ptr
    elif kind == 2:
        out_ptr = v_ptr

    row, batch, token, head = places(block, tokens, HEADS, ROWS)
    packed = token + tl.where(second, TOKENS0, 0)
    e = tl.arange(0, BLOCK_E)
    mask = (row < B * tokens * HEADS)[:, None] & (e < E)[None, :]  # [ROWS, BLOCK_E]
    x_at = (batch * x_batch + token * x_token + head * E)[:, None] + e[None, :]
    place = (batch * (TOKENS0 + TOKENS1) + packed) * HEADS + head
    out_at = (place * E)[:, None] + e[None, :]
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    if kind == 2:
        tl.store(out_ptr + out_at, x, mask=mask)
    else:
        normed = is_normed(NORMED, second, kind)
        weight = tl.load(weight_ptr + e, mask=(e < E) & normed, other=1.0).to(tl.float32)[None, :]
        y = x.to(tl.float32)
        r = inverse_root(y, normed, eps, E)
        if roots_ptr is not None:
            roots = roots_ptr + kind.to(tl.int64) * B * (TOKENS0 + TOKENS1) * HEADS
            tl.store(roots + place, r, mask=row < B * tokens * HEADS)
        n = rounded(y * r[:, None], weight_ptr.dtype.element_ty)
        y = rounded(n * weight, weight_ptr.dtype.element_ty)
        if ROTARY:
            table_at = (packed * E)[:, None] + e[None, :]
            even, odd = tl.split(tl.reshape(y, [ROWS, BLOCK_E // 2, 2]))
            y = y * tl.load(cos_ptr + table_at, mask=mask, other=0.0)
            y += tl.interleave(-odd, even) * tl.load(sin_ptr + table_at, mask=mask, other=0.0)
        tl.store(out_ptr + out_at, rounded(y, x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def qk_rms_norm_backward_kernel(
    q0_ptr, k0_ptr, q1_ptr, k1_ptr, q0_weight_ptr, k0_weight_ptr, q1_weight_ptr, k1_weight_ptr,
    roots_ptr, q_grad_ptr, k_grad_ptr, v_grad_ptr, dq0_ptr, dk0_ptr, dv0_ptr, dq1_ptr, dk1_ptr, dv1_ptr,
    cos_ptr, sin_ptr, partial_ptr,
    B, TOKENS0, TOKENS1, HEADS, batch0, token0, batch1, token1, grad_batch, grad_token, grad_head, eps,
    NORMED: tl.constexpr, ROTARY: tl.constexpr, WEIGHT_GRADS: tl.constexpr,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # grid as forward; partial: [2, first axis of the grid, E] sums of a program for the gradients of both weights; with
    # roots, q and k are what forward has packed: parts of it, with their strides
    kind, first_blocks = tl.program_id(1), tl.cdiv(B * TOKENS0 * HEADS, ROWS)
    second = tl.program_id(0) >= first_blocks
    block = tl.program_id(0) - tl.where(second, first_blocks, 0)
    tokens, x_batch, x_token = of_stream(second, TOKENS0, TOKENS1, batch0, batch1, token0, token1)
    if second:
        x_ptr, weight_ptr, dx_ptr = q1_ptr, q1_weight_ptr, dq1_ptr
        if kind == 1:
            x_ptr, weight_ptr, dx_ptr = k1_ptr, k1_weight_ptr, dk1_ptr
        elif kind == 2:
            dx_ptr = dv1_ptr
    else:
        x_ptr, weight_ptr, dx_ptr = q0_ptr, q0_weight_ptr, dq0_ptr
        if kind == 1:
            x_ptr, weight_ptr, dx_ptr = k0_ptr, k0_weight_ptr, dk0_ptr
        elif kind == 2:
            dx_ptr = dv0_ptr
    grad_ptr = q_grad_ptr
    if kind == 1:
        grad_ptr = k_grad_ptr
    elif kind == 2:
        grad_ptr = v_grad_ptr

    row, batch, token, head = places(block, tokens, HEADS, ROWS)
    packed = token + tl.where(second, TOKENS0, 0)
    e = tl.arange(0, BLOCK_E)
    mask = (row < B * tokens * HEADS)[:, None] & (e < E)[None, :]  # [ROWS, BLOCK_E]
    grad_at = (batch * grad_batch + packed * grad_token + head * grad_head)[:, None] + e[None, :]
    dx_at = (row.to(tl.int64) * E)[:, None] + e[None, :]
    grad = tl.load(grad_ptr + grad_at, mask=mask, other=0.0)
    if kind == 2:
        tl.store(dx_ptr + dx_at, grad, mask=mask)
    else:
        g = grad.to(tl.float32)
        if ROTARY:
            table_at = (packed * E)[:, None] + e[None, :]
            cos = tl.load(cos_ptr + table_at, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + table_at, mask=mask, other=0.0)
            g = turned_back(g, cos, sin, ROWS, BLOCK_E)
        normed = is_normed(NORMED, second, kind)
        x_at = (batch * x_batch + token * x_token + head * E)[:, None] + e[None, :]
        x = tl.load(x_ptr + x_at, mask=mask & normed, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + e, mask=(e < E) & normed, other=1.0).to(tl.float32)[None, :]
        if roots_ptr is not None:
            place = (batch * (TOKENS0 + TOKENS1) + packed) * HEADS + head
            roots = roots_ptr + kind.to(tl.int64) * B * (TOKENS0 + TOKENS1) * HEADS
            r = tl.load(roots + place, mask=row < B * tokens * HEADS, other=1.0)[:, None]
            if ROTARY:
                x = turned_back(x, cos, sin, ROWS, BLOCK_E)
            n = x / weight
        else:
            r = inverse_root(x, normed, eps, E)[:, None]
            n = x * r
        if WEIGHT_GRADS:
            at = (kind.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * E + e
            tl.store(partial_ptr + at, tl.sum(g * n, axis=0), mask=e < E)
        d = g * weight
        dx = r * (d - n * (tl.sum(d * n, axis=1) / E)[:, None])
        tl.store(dx_ptr + dx_at, rounded(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def turned_back(x, cos, sin, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The transposed rotary embedding, which is its inverse: pairs (a, b) go to `(a cos + b sin, b cos - a sin)`."""
    even, odd = tl.split(tl.reshape(x * sin, [ROWS, BLOCK_E // 2, 2]))
    return x * cos + tl.interleave(odd, -even)


@triton.jit
def of_stream(second, TOKENS0, TOKENS1, batch0, batch1, token0, token1):
    """Tokens of a program's stream and the strides of its batch and token."""
    tokens = tl.where(second, tl.cast(TOKENS1, tl.int32), tl.cast(TOKENS0, tl.int32))
    x_batch = tl.where(second, tl.cast(batch1, tl.int64), tl.cast(batch0, tl.int64))
    x_token = tl.where(second, tl.cast(token1, tl.int64), tl.cast(token0, tl.int64))
    return tokens, x_batch, x_token


@triton.jit
def places(block, tokens, HEADS, ROWS: tl.constexpr):
    """Rows of a block, `[ROWS]`, and batch, token and head of each; the last three in int64, for addresses."""
    row = block * ROWS + tl.arange(0, ROWS)
    position = row // HEADS
    return (
        row,
        (position // tokens).to(tl.int64),
        (position % tokens).to(tl.int64),
        (row % HEADS).to(tl.int64),
    )


@triton.jit
def is_normed(NORMED: tl.constexpr, second, kind):
    """Bit 2 * stream + kind of NORMED."""
    return ((NORMED >> (tl.where(second, 2, 0) + kind)) & 1) == 1


@triton.jit
def inverse_root(x, normed, eps, E: tl.constexpr):
    """`1 / rms` of each row; 1 where there is no norm."""
    return tl.where(normed, 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / E + eps), 1.0)
