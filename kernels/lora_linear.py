"""Triton kernels of `fdfo_engine.ops.adapted_projections`. Device code: imports triton only, never the engine.

A launch runs up to two streams of tokens with up to three layers each. What belongs to a stream comes as a tuple of
STREAMS, what belongs to a layer as one of STREAMS * LAYERS, layer by layer of the first stream, then of the second.
Rows of a stream lie in samples of S tokens: row m of x is at `(m // S) * batch + (m % S) * row`.

An adapter's product x A^T is its rank-R product, `[M, R]`; its gradient g B is the rank-R gradient. Both hold the
adapter's scale already, and those of a stream's layers lie side by side in one tensor.

Adapter factors are float32 in memory and rounded to the model's dtype on the way into a product. `WIDE` makes operands
float32: for float32 models, and for the interpreter, whose products of bfloat16 are wrong.
"""

import triton
import triton.language as tl
from fdfo_engine.kernels.gelu import gelu
from fdfo_engine.kernels.philox import rounded
from fdfo_engine.kernels.tuples import pointer_of, scale_of, size_of


@triton.jit
def operand(x, dtype: tl.constexpr, WIDE: tl.constexpr):
    """`x` as an operand of a product in the model's `dtype`."""
    if WIDE:
        return rounded(x.to(tl.float32), dtype)
    return x.to(dtype)


@triton.jit
def product(a, b, acc):
    """`acc + a b`, float32, without the short mantissas of TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def starts_of(m, S, batch, row):
    """Offsets of rows m, `[ROWS]`, int64."""
    return (m // S).to(tl.int64) * batch + (m % S).to(tl.int64) * row


@triton.jit(do_not_specialize=["B"])
def lora_linear_kernel(
    xs, weights, biases, rank_products, factors, hs, residuals, gates, norms, rstds, outs, B, Ss, x_batches, x_rows,
    rank_rows, Ns, Rs, residual_batches, residual_rows, gate_rows, out_batches, K, eps,
    STREAMS: tl.constexpr, LAYERS: tl.constexpr, HEAD: tl.constexpr, GELU: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # grid: tiles of all layers, one layer after the other; of a layer GROUP tiles of rows at a time, whose operands
    # stay in L2: out [M, N] = x W^T + rank_product B^T + bias, W is [N, K], B [N, R]; without any adapter RANK is 0.
    # GELU is taken of that, or it is added to a residual [M, N] through the gate [B, N] of each sample; with norms
    # every HEAD columns of all but a stream's last layer are divided by their rms and multiplied by a weight; rstds, if
    # there, keep 1 / rms and lie as out does
    dtype: tl.constexpr = xs[0].dtype.element_ty
    COUNT: tl.constexpr = STREAMS * LAYERS
    layer, tile = layer_of(tl.program_id(0), B, Ss, Ns, STREAMS, LAYERS, ROWS, COLUMNS)
    stream = layer // LAYERS
    S, N = size_of(Ss, stream, STREAMS), size_of(Ns, layer, COUNT)
    M = B * S
    x_ptr, weight_ptr = pointer_of(xs, stream, STREAMS), pointer_of(weights, layer, COUNT)
    tile_m, tile_n = tile_of(tile, tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), GROUP)
    m = tile_m * ROWS + tl.arange(0, ROWS)  # [ROWS]
    n = tile_n.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]
    x_at = starts_of(m, S, size_of(x_batches, stream, STREAMS), size_of(x_rows, stream, STREAMS))
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, K, INNER):
        k = first + tl.arange(0, INNER)  # [INNER]
        x = tl.load(x_ptr + x_at[:, None] + k[None, :], mask=in_m & (k < K)[None, :], other=0.0)
        weight = tl.load(weight_ptr + n[None, :] * K + k[:, None], mask=in_n & (k < K)[:, None], other=0.0)
        acc = product(operand(x, dtype, WIDE), operand(weight, dtype, WIDE), acc)
    if RANK > 0:
        R, rank_product_ptr = size_of(Rs, layer, COUNT), pointer_of(rank_products, layer, COUNT)
        factor_ptr = pointer_of(factors, layer, COUNT)
        rank_at = m.to(tl.int64) * size_of(rank_rows, stream, STREAMS)
        for first in range(0, R, RANK):
            r = first + tl.arange(0, RANK)  # [RANK]
            low = tl.load(rank_product_ptr + rank_at[:, None] + r[None, :], mask=in_m & (r < R)[None, :], other=0.0)
            factor = tl.load(factor_ptr + n[None, :] * R + r[:, None], mask=in_n & (r < R)[:, None], other=0.0)
            acc = product(operand(low, dtype, WIDE), operand(factor, dtype, WIDE), acc)
    if biases[0] is not None:
        acc += tl.load(pointer_of(biases, layer, COUNT) + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = starts_of(m, S, size_of(out_batches, layer, COUNT), N)[:, None] + n[None, :]
    if hs[0] is not None:
        tl.store(pointer_of(hs, layer, COUNT) + at, rounded(acc, dtype), mask=in_m & in_n)
    if GELU:
        acc, _ = gelu(acc)
    if norms[0] is not None and layer % LAYERS < LAYERS - 1:
        norm_ptr = pointer_of(norms, layer, COUNT)
        acc, rstd = by_head(acc, eps, HEAD)
        if rstds[0] is not None:
            head = tile_n * (COLUMNS // HEAD) + tl.arange(0, COLUMNS // HEAD)
            rstd_at = starts_of(m, S, size_of(out_batches, layer, COUNT) // HEAD, N // HEAD)[:, None] + head[None, :]
            tl.store(pointer_of(rstds, layer, COUNT) + rstd_at, rstd, mask=in_m & (head < N // HEAD)[None, :])
        acc = rounded(acc, norm_ptr.dtype.element_ty)
        acc *= tl.load(norm_ptr + n % HEAD, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if residuals[0] is not None:
        residual_at = starts_of(
            m, S, size_of(residual_batches, layer, COUNT), size_of(residual_rows, layer, COUNT)
        )[:, None] + n[None, :]  # fmt: skip
        gate_at = starts_of(m, S, size_of(gate_rows, layer, COUNT), 0)[:, None] + n[None, :]
        gate = tl.load(pointer_of(gates, layer, COUNT) + gate_at, mask=in_m & in_n, other=0.0).to(tl.float32)
        residual = tl.load(pointer_of(residuals, layer, COUNT) + residual_at, mask=in_m & in_n, other=0.0)
        acc = residual.to(tl.float32) + gate * acc
    tl.store(pointer_of(outs, layer, COUNT) + at, rounded(acc, dtype), mask=in_m & in_n)


@triton.jit
def by_head(x, eps, HEAD: tl.constexpr):
    """Every HEAD columns of x divided by their rms, and the reciprocals of that."""
    heads = tl.reshape(x, [x.shape[0], x.shape[1] // HEAD, HEAD])
    rstds = 1.0 / tl.sqrt_rn(tl.sum(heads * heads, axis=2) / HEAD + eps)
    return tl.reshape(heads * rstds[:, :, None], [x.shape[0], x.shape[1]]), rstds


@triton.jit
def layer_of(
    program, B, Ss, Ns, STREAMS: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Layer of a program, counted through both streams, and its tile there."""
    layer, tile = 0, program
    before = 0
    for j in tl.static_range(STREAMS * LAYERS):
        if j > 0:
            inside = program >= before
            layer, tile = tl.where(inside, j, layer), tl.where(inside, program - before, tile)
        before += tl.cdiv(B * Ss[j // LAYERS], ROWS) * tl.cdiv(Ns[j], COLUMNS)
    return layer, tile


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile of rows and of columns of a program: down GROUP tiles of rows, then on to the next column."""
    first = program // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit(do_not_specialize=["B"])
def lora_linear_input_kernel(
    grads, weights, rank_grads, factors, h_ptr, outs, B, Ss, rank_rows, out_batches, Ns, Rs, grad_batches, grad_rows,
    weight_rows, K,
    STREAMS: tl.constexpr, LAYERS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # grid: as above, a stream in the place of a layer: out [M, K] = the sum over layers of grad W + rank_grad A, times
    # the slope of GELU at h where that is given; W is [N, K], A [R, K]; without any adapter RANK is 0
    dtype: tl.constexpr = grads[0].dtype.element_ty
    tiles_k, first_tiles = tl.cdiv(K, COLUMNS), tl.cdiv(B * Ss[0], ROWS) * tl.cdiv(K, COLUMNS)
    stream = (tl.program_id(0) >= first_tiles).to(tl.int32)
    S = size_of(Ss, stream, STREAMS)
    M = B * S
    tile = tl.program_id(0) - tl.where(stream == 1, first_tiles, 0)
    tile_m, tile_k = tile_of(tile, tl.cdiv(M, ROWS), tiles_k, GROUP)
    m = tile_m * ROWS + tl.arange(0, ROWS)  # [ROWS]
    k = tile_k.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    in_m, in_k = (m < M)[:, None], (k < K)[None, :]
    rank_at = m.to(tl.int64) * size_of(rank_rows, stream, STREAMS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.static_range(LAYERS):
        layer = stream * LAYERS + i
        N, grad_ptr = size_of(Ns, layer, STREAMS * LAYERS), pointer_of(grads, layer, STREAMS * LAYERS)
        weight_ptr = pointer_of(weights, layer, STREAMS * LAYERS)
        batch = size_of(grad_batches, layer, STREAMS * LAYERS)
        weight_row = size_of(weight_rows, layer, STREAMS * LAYERS)
        grad_at = starts_of(m, S, batch, size_of(grad_rows, layer, STREAMS * LAYERS))
        for first in range(0, N, INNER):
            n = first + tl.arange(0, INNER)  # [INNER]
            grad = tl.load(grad_ptr + grad_at[:, None] + n[None, :], mask=in_m & (n < N)[None, :], other=0.0)
            weight_at = n.to(tl.int64)[:, None] * weight_row + k[None, :]
            weight = tl.load(weight_ptr + weight_at, mask=in_k & (n < N)[:, None], other=0.0)
            acc = product(operand(grad, dtype, WIDE), operand(weight, dtype, WIDE), acc)
        if RANK > 0:
            R, rank_grad_ptr = size_of(Rs, layer, STREAMS * LAYERS), pointer_of(rank_grads, layer, STREAMS * LAYERS)
            factor_ptr = pointer_of(factors, layer, STREAMS * LAYERS)
            for first in range(0, R, RANK):
                r = first + tl.arange(0, RANK)  # [RANK]
                low = tl.load(rank_grad_ptr + rank_at[:, None] + r[None, :], mask=in_m & (r < R)[None, :], other=0.0)
                factor = tl.load(factor_ptr + r[:, None] * K + k[None, :], mask=in_k & (r < R)[:, None], other=0.0)
                acc = product(operand(low, dtype, WIDE), operand(factor, dtype, WIDE), acc)
    at = starts_of(m, S, size_of(out_batches, stream, STREAMS), K)[:, None] + k[None, :]
    if h_ptr is not None:
        _, slope = gelu(tl.load(h_ptr + at, mask=in_m & in_k, other=0.0).to(tl.float32))
        acc *= slope
    tl.store(pointer_of(outs, stream, STREAMS) + at, rounded(acc, dtype), mask=in_m & in_k)


@triton.jit(do_not_specialize=["B"])
def lora_linear_rank_product_kernel(
    xs, factors, outs, B, Ss, x_batches, x_rows, out_rows, Rs, scales, K,
    STREAMS: tl.constexpr, LAYERS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # grid (tiles of the rows of both streams, cdiv(max R, RANK)): out [M, R] = scale * x A^T of every layer of a
    # stream, whose x is read once; A is [R, K]
    dtype: tl.constexpr = xs[0].dtype.element_ty
    stream, m = rows_of(tl.program_id(0), B, Ss, STREAMS, ROWS)
    S = size_of(Ss, stream, STREAMS)
    M = B * S
    x_ptr, in_m = pointer_of(xs, stream, STREAMS), (m < M)[:, None]
    x_at = starts_of(m, S, size_of(x_batches, stream, STREAMS), size_of(x_rows, stream, STREAMS))
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)  # [RANK]
    acc0 = tl.zeros([ROWS, RANK], tl.float32)
    acc1, acc2 = acc0, acc0
    for first in range(0, K, INNER):
        k = first + tl.arange(0, INNER)  # [INNER]
        x = tl.load(x_ptr + x_at[:, None] + k[None, :], mask=in_m & (k < K)[None, :], other=0.0)
        x = operand(x, dtype, WIDE)
        acc0 = product(x, transposed_factor(factors, Rs, stream, 0, r, k, K, STREAMS, LAYERS, dtype, WIDE), acc0)
        if LAYERS > 1:
            acc1 = product(x, transposed_factor(factors, Rs, stream, 1, r, k, K, STREAMS, LAYERS, dtype, WIDE), acc1)
        if LAYERS > 2:
            acc2 = product(x, transposed_factor(factors, Rs, stream, 2, r, k, K, STREAMS, LAYERS, dtype, WIDE), acc2)
    at = m.to(tl.int64)[:, None] * size_of(out_rows, stream, STREAMS) + r[None, :]
    for i in tl.static_range(LAYERS):
        acc = acc0 if i == 0 else acc1 if i == 1 else acc2
        layer = stream * LAYERS + i
        mask = in_m & (r < size_of(Rs, layer, STREAMS * LAYERS))[None, :]
        scale = scale_of(scales, layer, STREAMS * LAYERS)
        tl.store(pointer_of(outs, layer, STREAMS * LAYERS) + at, rounded(scale * acc, dtype), mask=mask)


@triton.jit
def transposed_factor(
    factors, Rs, stream, i: tl.constexpr, r, k, K, STREAMS: tl.constexpr, LAYERS: tl.constexpr,
    dtype: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of A^T, `[INNER, RANK]`, of layer i of a stream, as an operand."""
    layer = stream * LAYERS + i
    mask = (k < K)[:, None] & (r < size_of(Rs, layer, STREAMS * LAYERS))[None, :]
    factor_ptr = pointer_of(factors, layer, STREAMS * LAYERS)
    return operand(tl.load(factor_ptr + r[None, :] * K + k[:, None], mask=mask, other=0.0), dtype, WIDE)


@triton.jit
def rows_of(program, B, Ss, STREAMS: tl.constexpr, ROWS: tl.constexpr):
    """Stream of a program, and its rows, `[ROWS]`."""
    first = tl.cdiv(B * Ss[0], ROWS)
    stream = (program >= first).to(tl.int32)
    return stream, (program - tl.where(stream == 1, first, 0)) * ROWS + tl.arange(0, ROWS)


@triton.jit(do_not_specialize=["B"])
def lora_linear_rank_gradient_kernel(
    grads, factors, outs, gates, norms, normed, rstds, product_grads, B, Ss, out_rows, Ns, Rs, grad_batches, grad_rows,
    gate_rows, normed_batches, scales,
    STREAMS: tl.constexpr, LAYERS: tl.constexpr, NORMED: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # grid (tiles of the rows of both streams, cdiv(max R, RANK), LAYERS): out [M, R] = scale * product_grad B; B is
    # [N, R]. product_grad [M, N] is grad, or what it becomes on its way back to the product: times a gate [B, N] of
    # each sample; or, for layers whose bit is in NORMED, through their norms by HEAD columns, whose outputs are normed.
    # Then it is stored
    dtype: tl.constexpr = grads[0].dtype.element_ty
    stream, m = rows_of(tl.program_id(0), B, Ss, STREAMS, ROWS)
    layer = stream * LAYERS + tl.program_id(2)
    COUNT: tl.constexpr = STREAMS * LAYERS
    S = size_of(Ss, stream, STREAMS)
    M = B * S
    N, R = size_of(Ns, layer, COUNT), size_of(Rs, layer, COUNT)
    grad_ptr, factor_ptr = pointer_of(grads, layer, COUNT), pointer_of(factors, layer, COUNT)
    grad_at = starts_of(m, S, size_of(grad_batches, layer, COUNT), size_of(grad_rows, layer, COUNT))
    in_m = (m < M)[:, None]
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)  # [RANK]
    is_normed, is_stored = ((NORMED >> layer) & 1) == 1, tl.program_id(1) == 0
    if NORMED > 0:
        is_stored = is_stored & is_normed
    acc = tl.zeros([ROWS, RANK], tl.float32)
    for first in range(0, N, INNER):
        n = first + tl.arange(0, INNER)  # [INNER]
        mask = in_m & (n < N)[None, :]
        grad = tl.load(grad_ptr + grad_at[:, None] + n[None, :], mask=mask, other=0.0)
        if gates[0] is not None:
            gate_at = starts_of(m, S, size_of(gate_rows, layer, COUNT), 0)[:, None] + n[None, :]
            gate = tl.load(pointer_of(gates, layer, COUNT) + gate_at, mask=mask, other=0.0)
            grad = rounded(grad.to(tl.float32) * gate.to(tl.float32), dtype).to(dtype)
        if NORMED > 0:  # noqa: SIM102 - a constant, without which the rest is not compiled
            if is_normed:
                batch = size_of(normed_batches, layer, COUNT)
                y_at = starts_of(m, S, batch, N)[:, None] + n[None, :]
                y = tl.load(pointer_of(normed, layer, COUNT) + y_at, mask=mask, other=0.0).to(tl.float32)
                weight = tl.load(pointer_of(norms, layer, COUNT) + n % HEAD).to(tl.float32)
                head = first // HEAD + tl.arange(0, INNER // HEAD)
                rstd_at = starts_of(m, S, batch // HEAD, N // HEAD)[:, None] + head[None, :]
                in_heads = in_m & (head < N // HEAD)[None, :]
                rstd = tl.load(pointer_of(rstds, layer, COUNT) + rstd_at, mask=in_heads, other=0.0)
                grad = rounded(before_norm(grad.to(tl.float32), y, weight, rstd, HEAD), dtype).to(dtype)
        if product_grads[0] is not None:
            product_at = m.to(tl.int64)[:, None] * N + n[None, :]
            tl.store(pointer_of(product_grads, layer, COUNT) + product_at, grad, mask=mask & is_stored)
        factor = tl.load(factor_ptr + n[:, None] * R + r[None, :], mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
        acc = product(operand(grad, dtype, WIDE), operand(factor, dtype, WIDE), acc)
    at = m.to(tl.int64)[:, None] * size_of(out_rows, stream, STREAMS) + r[None, :]
    scale = scale_of(scales, layer, COUNT)
    tl.store(pointer_of(outs, layer, COUNT) + at, rounded(scale * acc, dtype), mask=in_m & (r < R)[None, :])


@triton.jit
def before_norm(grad, y, weight, rstd, HEAD: tl.constexpr):
    """Gradient of what was normed by HEAD columns, whose outputs times `weight` are y; `rstd` is 1 / rms of each."""
    shape: tl.constexpr = [grad.shape[0], grad.shape[1] // HEAD, HEAD]
    n = tl.reshape(y / weight[None, :], shape)
    d = tl.reshape(grad * weight[None, :], shape)
    slope = rstd[:, :, None] * (d - n * (tl.sum(d * n, axis=2) / HEAD)[:, :, None])
    return tl.reshape(slope, [grad.shape[0], grad.shape[1]])


@triton.jit(do_not_specialize=["B"])
def lora_linear_factors_kernel(
    xs, grads, rank_products, rank_grads, partial_ptr, B, Ss, x_batches, x_rows, rank_rows, rank_grad_rows,
    Ns, Rs, grad_batches, grad_rows, K, TOTAL,
    STREAMS: tl.constexpr, LAYERS: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # grid (the sum over layers of cdiv(K, COLUMNS) + cdiv(N, COLUMNS), cdiv(max R, RANK), SPLITS): a part of the rows
    # gives partial [SPLITS, TOTAL]: layer by layer the sums of dA = rank_grad^T x, then those of dB = grad^T
    # rank_product
    dtype: tl.constexpr = xs[0].dtype.element_ty
    COUNT: tl.constexpr = STREAMS * LAYERS
    layer, tile, place = factors_of(tl.program_id(0), Ns, Rs, K, COUNT, COLUMNS)
    stream, of_a = layer // LAYERS, tile < tl.cdiv(K, COLUMNS)
    S = size_of(Ss, stream, STREAMS)
    M = B * S
    N, R = size_of(Ns, layer, COUNT), size_of(Rs, layer, COUNT)
    wide_ptr, narrow_ptr, size = pointer_of(xs, stream, STREAMS), pointer_of(rank_grads, layer, COUNT), K
    batch, row = size_of(x_batches, stream, STREAMS), size_of(x_rows, stream, STREAMS)
    narrow_row = size_of(rank_grad_rows, stream, STREAMS)
    if not of_a:
        wide_ptr, narrow_ptr, size = pointer_of(grads, layer, COUNT), pointer_of(rank_products, layer, COUNT), N
        batch, row = size_of(grad_batches, layer, COUNT), size_of(grad_rows, layer, COUNT)
        narrow_row = size_of(rank_rows, stream, STREAMS)
        tile -= tl.cdiv(K, COLUMNS)
    c = tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)  # [RANK]
    split = ROWS * tl.cdiv(M, ROWS * SPLITS)
    begin = tl.program_id(2) * split
    end = min(begin + split, M)
    acc = tl.zeros([RANK, COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        m = first + tl.arange(0, ROWS)  # [ROWS]
        in_m = (m < end)[:, None]
        narrow_at = m.to(tl.int64)[:, None] * narrow_row + r[None, :]
        narrow = tl.load(narrow_ptr + narrow_at, mask=in_m & (r < R)[None, :], other=0.0)
        wide_at = starts_of(m, S, batch, row)[:, None] + c[None, :]
        wide = tl.load(wide_ptr + wide_at, mask=in_m & (c < size)[None, :], other=0.0)
        acc = product(operand(narrow, dtype, WIDE).T, operand(wide, dtype, WIDE), acc)
    at = tl.where(of_a, r[:, None] * K + c[None, :], R * K + c[None, :] * R + r[:, None])
    into = partial_ptr + tl.program_id(2).to(tl.int64) * TOTAL + place
    tl.store(into + at, acc, mask=(r < R)[:, None] & (c < size)[None, :])


@triton.jit
def factors_of(program, Ns, Rs, K, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """Layer of a program, its tile there, and where the layer's sums begin."""
    layer, tile, place = 0, program, tl.cast(0, tl.int64)
    before, begin = 0, tl.cast(0, tl.int64)
    for j in tl.static_range(COUNT):
        if j > 0:
            inside = program >= before
            layer, tile = tl.where(inside, j, layer), tl.where(inside, program - before, tile)
            place = tl.where(inside, begin, place)
        before += tl.cdiv(K, COLUMNS) + tl.cdiv(Ns[j], COLUMNS)
        begin += tl.cast(Rs[j], tl.int64) * (K + Ns[j])
    return layer, tile, place


@triton.jit
def lora_linear_sum_kernel(partial_ptr, out_ptr, COUNT, SPLITS, BLOCK: tl.constexpr):
    # grid cdiv(COUNT, BLOCK): out [COUNT] = the sum of partial [SPLITS, COUNT], in order
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(0, SPLITS):
        acc += tl.load(partial_ptr + split * tl.cast(COUNT, tl.int64) + offs, mask=offs < COUNT, other=0.0)
    tl.store(out_ptr + offs, acc, mask=offs < COUNT)
