"""Triton kernels of `fdfo_engine.ops.lora_linear`. Device code: imports triton only, never the engine.

Adapter factors are float32 in memory and rounded to the model's dtype on the way into a product. `WIDE` makes operands
float32: for float32 models, and for the interpreter, whose products of bfloat16 are wrong.
"""

import triton
import triton.language as tl
from fdfo_engine.kernels.gelu import gelu
from fdfo_engine.kernels.philox import rounded


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
def lora_linear_thin_kernel(
    x_ptr, factor_ptr, out_ptr, M, K, R, x_row, out_row, scale,
    BACKWARD: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # grid (cdiv(M, ROWS), cdiv(R, RANK)): out [M, R] = scale * x F^T; F is A [R, K], or stored as B [K, R] if BACKWARD
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)  # [RANK]
    acc = tl.zeros([ROWS, RANK], tl.float32)
    for first in range(0, K, INNER):
        k = first + tl.arange(0, INNER)  # [INNER]
        x = tl.load(x_ptr + m[:, None] * x_row + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        at = k[:, None] * R + r[None, :] if BACKWARD else r[None, :] * K + k[:, None]
        factor = tl.load(factor_ptr + at, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0)  # [INNER, RANK]
        acc = product(operand(x, dtype, WIDE), operand(factor, dtype, WIDE), acc)
    mask = (m < M)[:, None] & (r < R)[None, :]
    tl.store(out_ptr + m[:, None] * out_row + r[None, :], rounded(scale * acc, dtype), mask=mask)


@triton.jit
def lora_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, thin_ptr, factor_ptr, add_ptr, h_ptr, out_ptr, M, N, K, R, x_row, thin_row,
    BACKWARD: tl.constexpr, GELU: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # grid cdiv(M, ROWS) * cdiv(N, COLUMNS), GROUP tiles of rows at a time, whose operands stay in L2:
    # out [M, N] = x W^T + thin F^T + bias + add. W is [N, K], F is B [N, R]; if BACKWARD, W is [K, N], F is A [R, N]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), GROUP)
    m = tile_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    n = tile_n.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, K, INNER):
        k = first + tl.arange(0, INNER)  # [INNER]
        x = tl.load(x_ptr + m[:, None] * x_row + k[None, :], mask=in_m & (k < K)[None, :], other=0.0)
        at = k[:, None] * N + n[None, :] if BACKWARD else n[None, :] * K + k[:, None]
        weight = tl.load(weight_ptr + at, mask=in_n & (k < K)[:, None], other=0.0)  # [INNER, COLUMNS]
        acc = product(operand(x, dtype, WIDE), operand(weight, dtype, WIDE), acc)
    for first in range(0, R, RANK):
        r = first + tl.arange(0, RANK)  # [RANK]
        thin = tl.load(thin_ptr + m[:, None] * thin_row + r[None, :], mask=in_m & (r < R)[None, :], other=0.0)
        at = r[:, None] * N + n[None, :] if BACKWARD else n[None, :] * R + r[:, None]
        factor = tl.load(factor_ptr + at, mask=in_n & (r < R)[:, None], other=0.0)  # [RANK, COLUMNS]
        acc = product(operand(thin, dtype, WIDE), operand(factor, dtype, WIDE), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m[:, None] * N + n[None, :]
    if add_ptr is not None:
        acc += tl.load(add_ptr + at, mask=in_m & in_n, other=0.0).to(tl.float32)
    if h_ptr is not None:
        tl.store(h_ptr + at, rounded(acc, dtype), mask=in_m & in_n)
    if GELU:
        acc, _ = gelu(acc)
    tl.store(out_ptr + at, rounded(acc, dtype), mask=in_m & in_n)


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile of rows and of columns of a program: down GROUP tiles of rows, then on to the next column."""
    first = program // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def lora_linear_factors_kernel(
    x_ptr, grad_ptr, thin_ptr, thin_grad_ptr, partial_ptr, M, N, K, R, x_row, grad_row, thin_row, thin_grad_row, SPLIT,
    WIDE: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # grid (cdiv(K, COLUMNS) + cdiv(N, COLUMNS), cdiv(R, RANK), splits): SPLIT rows of x and grad, each read once, give
    # partial [splits, R * K + N * R], the sums of dA = thin_grad^T x, then those of dB = grad^T thin
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile, tiles_k = tl.program_id(0), tl.cdiv(K, COLUMNS)
    of_a = tile < tiles_k
    wide_ptr, narrow_ptr, size = x_ptr, thin_grad_ptr, K
    wide_row, narrow_row = x_row, thin_grad_row
    if tile >= tiles_k:
        wide_ptr, narrow_ptr, size = grad_ptr, thin_ptr, N
        wide_row, narrow_row = grad_row, thin_row
        tile -= tiles_k
    c = tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)  # [RANK]
    begin = tl.program_id(2).to(tl.int64) * SPLIT
    end = min(begin + SPLIT, M)
    acc = tl.zeros([RANK, COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        m = first + tl.arange(0, ROWS)  # [ROWS]
        in_m = (m < end)[:, None]
        narrow = tl.load(narrow_ptr + m[:, None] * narrow_row + r[None, :], mask=in_m & (r < R)[None, :], other=0.0)
        wide = tl.load(wide_ptr + m[:, None] * wide_row + c[None, :], mask=in_m & (c < size)[None, :], other=0.0)
        acc = product(operand(narrow, dtype, WIDE).T, operand(wide, dtype, WIDE), acc)
    at = tl.where(of_a, r[:, None] * K + c[None, :], R * K + c[None, :] * R + r[:, None])
    into = partial_ptr + tl.program_id(2).to(tl.int64) * R * (K + N)
    tl.store(into + at, acc, mask=(r < R)[:, None] & (c < size)[None, :])


@triton.jit
def lora_linear_sum_kernel(partial_ptr, out_ptr, COUNT, SPLITS, BLOCK: tl.constexpr):
    # grid cdiv(COUNT, BLOCK): out [COUNT] = the sum of partial [SPLITS, COUNT], in order
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(0, SPLITS):
        acc += tl.load(partial_ptr + split * tl.cast(COUNT, tl.int64) + offs, mask=offs < COUNT, other=0.0)
    tl.store(out_ptr + offs, acc, mask=offs < COUNT)
