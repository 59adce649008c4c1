"""Triton kernels of `fdfo_engine.ops.qk_rms_norm`. Device code: imports triton only, never the engine.

A launch takes one or two STREAMS of tokens, and of each KINDS = 2 or 3 tensors: q, k and perhaps v. What belongs to a
stream comes as a tuple of STREAMS, what belongs to its tensors as one of STREAMS * KINDS: q, k, v of the first stream,
then of the second. Of tensors that the norm reads, or its weights, there are two a stream: of q and of k. Tensors that
pack the streams along the tokens come as a tuple of KINDS.
"""

import triton
import triton.language as tl
from fdfo_engine.kernels.philox import rounded
from fdfo_engine.kernels.tuples import pointer_of, size_of


@triton.jit(do_not_specialize=["B"])
def qk_rms_norm_forward_kernel(
    xs, weights, outs, roots_ptr, cos_ptr, sin_ptr, B, tokens, HEADS, x_batches, x_tokens, eps,
    STREAMS: tl.constexpr, KINDS: tl.constexpr, NORMED: tl.constexpr, ROTARY: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # grid (the sum of cdiv(B * tokens * HEADS, ROWS) over streams, KINDS): heads of q, k and v. roots, if there, get
    # 1 / rms of each packed head, [2, B, all tokens, HEADS]. NORMED: bit 2 * stream + kind
    kind = tl.program_id(1)
    stream, block = stream_of(B, tokens, HEADS, STREAMS, ROWS)
    x_ptr = pointer_of(xs, stream * KINDS + kind, STREAMS * KINDS)
    out_ptr = pointer_of(outs, kind, KINDS)
    own_tokens = size_of(tokens, stream, STREAMS)
    row, batch, token, head = places(block, own_tokens, HEADS, ROWS)
    in_rows = row < B * own_tokens * HEADS
    packed = token + stream * tl.cast(tokens[0], tl.int32)
    e = tl.arange(0, BLOCK_E)
    mask = in_rows[:, None] & (e < E)[None, :]  # [ROWS, BLOCK_E]
    x_batch, x_token = size_of(x_batches, stream, STREAMS, tl.int64), size_of(x_tokens, stream, STREAMS, tl.int64)
    x_at = (batch * x_batch + token * x_token + head * E)[:, None] + e[None, :]
    all_tokens = total(tokens, STREAMS)
    place = (batch * all_tokens + packed) * HEADS + head
    out_at = (place * E)[:, None] + e[None, :]
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    if kind == 2:
        tl.store(out_ptr + out_at, x, mask=mask)
    else:
        weight_ptr = pointer_of(weights, stream * 2 + kind, STREAMS * 2)
        normed = is_normed(NORMED, stream, kind)
        weight = tl.load(weight_ptr + e, mask=(e < E) & normed, other=1.0).to(tl.float32)[None, :]
        y = x.to(tl.float32)
        r = inverse_root(y, normed, eps, E)
        if roots_ptr is not None:
            roots = roots_ptr + kind.to(tl.int64) * B * all_tokens * HEADS
            tl.store(roots + place, r, mask=in_rows)
        n = rounded(y * r[:, None], weight_ptr.dtype.element_ty)
        y = rounded(n * weight, weight_ptr.dtype.element_ty)
        if ROTARY:
            table_at = (packed * E)[:, None] + e[None, :]
            even, odd = tl.split(tl.reshape(y, [ROWS, BLOCK_E // 2, 2]))
            y = y * tl.load(cos_ptr + table_at, mask=mask, other=0.0)
            y += tl.interleave(-odd, even) * tl.load(sin_ptr + table_at, mask=mask, other=0.0)
        tl.store(out_ptr + out_at, rounded(y, x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B"])
def qk_rms_norm_backward_kernel(
    xs, weights, roots_ptr, upstreams, dxs, cos_ptr, sin_ptr, partial_ptr, B, tokens, HEADS, x_batches, x_tokens,
    up_batch, up_token, up_head, eps,
    STREAMS: tl.constexpr, KINDS: tl.constexpr, NORMED: tl.constexpr, ROTARY: tl.constexpr, WEIGHT_GRADS: tl.constexpr,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # grid as forward; partial: [2, first axis of the grid, E] sums of a program for the gradients of both weights; xs
    # are q and k, or with roots the parts of packed ones that the forward made of them
    kind = tl.program_id(1)
    stream, block = stream_of(B, tokens, HEADS, STREAMS, ROWS)
    upstream_ptr = pointer_of(upstreams, kind, KINDS)
    dx_ptr = pointer_of(dxs, stream * KINDS + kind, STREAMS * KINDS)
    own_tokens = size_of(tokens, stream, STREAMS)
    row, batch, token, head = places(block, own_tokens, HEADS, ROWS)
    in_rows = row < B * own_tokens * HEADS
    packed = token + stream * tl.cast(tokens[0], tl.int32)
    e = tl.arange(0, BLOCK_E)
    mask = in_rows[:, None] & (e < E)[None, :]  # [ROWS, BLOCK_E]
    up_at = (batch * up_batch + packed * up_token + head * up_head)[:, None] + e[None, :]
    dx_at = (row.to(tl.int64) * E)[:, None] + e[None, :]
    upstream = tl.load(upstream_ptr + up_at, mask=mask, other=0.0)
    if kind == 2:
        tl.store(dx_ptr + dx_at, upstream, mask=mask)
    else:
        g = upstream.to(tl.float32)
        if ROTARY:
            table_at = (packed * E)[:, None] + e[None, :]
            cos = tl.load(cos_ptr + table_at, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + table_at, mask=mask, other=0.0)
            g = turned_back(g, cos, sin, ROWS, BLOCK_E)
        x_ptr, weight_ptr = (
            pointer_of(xs, stream * 2 + kind, STREAMS * 2),
            pointer_of(weights, stream * 2 + kind, STREAMS * 2),
        )
        normed = is_normed(NORMED, stream, kind)
        x_batch, x_token = size_of(x_batches, stream, STREAMS, tl.int64), size_of(x_tokens, stream, STREAMS, tl.int64)
        x_at = (batch * x_batch + token * x_token + head * E)[:, None] + e[None, :]
        x = tl.load(x_ptr + x_at, mask=mask & normed, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + e, mask=(e < E) & normed, other=1.0).to(tl.float32)[None, :]
        if roots_ptr is not None:
            all_tokens = total(tokens, STREAMS)
            roots = roots_ptr + kind.to(tl.int64) * B * all_tokens * HEADS
            r = tl.load(roots + (batch * all_tokens + packed) * HEADS + head, mask=in_rows, other=1.0)[:, None]
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
def stream_of(B, tokens, HEADS, STREAMS: tl.constexpr, ROWS: tl.constexpr):
    """A program's stream, and which of the stream's programs it is."""
    first_programs = tl.cdiv(B * tl.cast(tokens[0], tl.int32) * HEADS, ROWS)
    stream = (tl.program_id(0) >= first_programs).to(tl.int32) if STREAMS == 2 else 0
    return stream, tl.program_id(0) - stream * first_programs


@triton.jit
def total(tokens, STREAMS: tl.constexpr):
    """Tokens of all streams of a sample."""
    found = tl.cast(tokens[0], tl.int32)
    for i in tl.static_range(1, STREAMS):
        found += tl.cast(tokens[i], tl.int32)
    return found


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
def is_normed(NORMED: tl.constexpr, stream, kind):
    """Bit 2 * stream + kind of NORMED."""
    return ((NORMED >> (2 * stream + kind)) & 1) == 1


@triton.jit
def inverse_root(x, normed, eps, E: tl.constexpr):
    """`1 / rms` of each row; 1 where there is no norm."""
    return tl.where(normed, 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / E + eps), 1.0)
