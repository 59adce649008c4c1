"""`lora_linear` by Triton: the adapter's product runs on in the accumulator of the base layer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fdfo_engine.ops import _dispatch, _gelu
from fdfo_engine.ops._lora_torch import Gradients, Linear, Outputs, Wants, joined_a, split_ranks


class Tile(NamedTuple):
    """Of a product: rows, columns and inner length of a block; tiles of rows that share columns; warps and stages."""

    rows: int
    columns: int
    inner: int
    group: int
    warps: int
    stages: int


# Not tuned on a GPU yet: as large as registers allow. float32 takes no tensor core; other dtypes go by the GPU's major
# compute capability and by whether GELU follows, which needs registers of its own.
FLOAT32_TILE = Tile(64, 64, 32, 8, 8, 2)
TILES = {
    (8, False): Tile(128, 128, 32, 8, 8, 3),
    (8, True): Tile(128, 128, 32, 8, 8, 3),
    (9, False): Tile(128, 256, 64, 8, 8, 3),
    (9, True): Tile(128, 128, 64, 8, 8, 4),
    (10, False): Tile(128, 128, 64, 8, 8, 4),
    (10, True): Tile(128, 128, 64, 8, 8, 4),
}
THIN = Tile(64, 0, 64, 0, 4, 3)  # of the product with a thin factor; columns are the rank
FACTORS = Tile(32, 128, 0, 0, 4, 3)  # of the factors' gradients: rows a step
SPLITS = 8  # parts into which their rows are cut
SUM_BLOCK = 1024
MAX_RANK = 64  # columns of the rank that a program takes


def tile(dtype: torch.dtype, major: int, *, gelu: bool) -> Tile:
    """Tile of the large product; GPUs that are not in the table take the smallest, which fits any shared memory."""
    return FLOAT32_TILE if dtype == torch.float32 else TILES.get((major, gelu), TILES[8, gelu])


def rank_block(rank: int) -> int:
    """Columns of the rank that one block holds: a power of two, at least the 16 of a tensor core."""
    return min(MAX_RANK, max(16, 1 << (rank - 1).bit_length()))


def forward(x: Tensor, linears: Sequence[Linear], scaling: float, *, gelu: bool, keep: bool, backend: str) -> Outputs:
    """As `_lora_torch.forward`. Layers without adapter go to torch: a plain product is best left to cuBLAS."""
    x = x.contiguous()
    thin = None
    if any(linear.rank for linear in linears):
        factor = joined_a(linears, torch.float32).contiguous()
        thin = torch.empty(len(x), len(factor), dtype=x.dtype, device=x.device)
        thin_product(x, factor, thin, scaling, backward=False)
    y, h = [], []
    for linear, part in zip(linears, split_ranks(thin, linears), strict=True):
        out = x.new_empty(len(x), len(linear.weight)) if linear.rank else functional.linear(x, *linear[:2])
        inner = torch.empty_like(out) if gelu and keep and linear.rank else None
        if part is not None:
            product(x, linear, part, out, h=inner, gelu=gelu, backward=False)
        elif gelu:
            inner, out = out, _gelu.forward(out, None, backend, inplace=not keep)
        y.append(out)
        h += [] if inner is None or not keep else [inner]
    return Outputs(y, h, thin)


def thin_gradients(grads: Sequence[Tensor | None], linears: Sequence[Linear], scaling: float) -> list[Tensor | None]:
    """`s g B` of each layer, `[M, r]`."""
    found: list[Tensor | None] = []
    for grad, linear in zip(grads, linears, strict=True):
        thin = None
        if grad is not None and linear.lora_b is not None:
            thin = grad.new_empty(len(grad), linear.rank)
            thin_product(grad, linear.lora_b.contiguous(), thin, scaling, backward=True)
        found.append(thin)
    return found


def input_gradient(
    grads: Sequence[Tensor | None], thins: Sequence[Tensor | None], linears: Sequence[Linear], _scaling: float
) -> Tensor | None:
    """`sum_i g_i W_i + (s g_i B_i) A_i`; None where no gradient came. The thin products are scaled already."""
    dx: Tensor | None = None
    for grad, thin, linear in zip(grads, thins, linears, strict=True):
        if grad is None:
            continue
        if thin is None:
            dx = grad @ linear.weight if dx is None else dx.addmm_(grad, linear.weight)
            continue
        before, dx = dx, grad.new_empty(len(grad), linear.weight.shape[1])
        product(grad, linear, thin, dx, add=before, backward=True)
    return dx


def parameter_gradients(
    grad: Tensor,
    x: Tensor,
    thin: Tensor | None,
    thin_grad: Tensor | None,
    _linear: Linear,
    _scaling: float,
    wants: Wants,
) -> Gradients:
    """As `_lora_torch.parameter_gradients`; both thin products are scaled already."""
    want_weight, want_bias, want_a, want_b = wants
    da = db = None
    if thin is not None and thin_grad is not None and (want_a or want_b):
        da, db = factor_gradients(x.contiguous(), grad, thin, thin_grad)
    return (
        grad.T @ x if want_weight else None, grad.sum(0) if want_bias else None,
        da if want_a else None, db if want_b else None,
    )  # fmt: skip


def thin_product(x: Tensor, factor: Tensor, out: Tensor, scaling: float, *, backward: bool) -> None:
    """`out [M, r] = scaling * x F^T`; F is `[r, K]`, or in the backward stored as `[K, r]`."""
    from fdfo_engine.kernels.lora_linear import lora_linear_thin_kernel  # triton: only where it runs

    (M, K), R = x.shape, out.shape[1]
    ranks = rank_block(R)
    with torch.cuda.device_of(x):  # triton launches on the current device, not on the tensor's
        lora_linear_thin_kernel[(-(-M // THIN.rows), -(-R // ranks))](
            x, factor, out, M, K, R, x.stride(0), out.stride(0), scaling, BACKWARD=backward, WIDE=wide(x.dtype),
            ROWS=THIN.rows, RANK=ranks, INNER=THIN.inner, num_warps=THIN.warps, num_stages=THIN.stages,
        )  # fmt: skip


def product(
    x: Tensor, linear: Linear, thin: Tensor, out: Tensor, *,
    backward: bool, add: Tensor | None = None, h: Tensor | None = None, gelu: bool = False,
) -> None:  # fmt: skip
    """`out = x W^T + thin B^T + bias`, or in the backward, where x is a gradient, `add + x W + thin A`."""
    from fdfo_engine.kernels.lora_linear import lora_linear_kernel  # triton: only where it runs

    factor = linear.lora_a if backward else linear.lora_b
    (M, K), N, R = x.shape, out.shape[1], thin.shape[1]
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
    t = tile(x.dtype, major, gelu=gelu)
    with torch.cuda.device_of(x):
        lora_linear_kernel[(-(-M // t.rows) * -(-N // t.columns),)](
            x, linear.weight.contiguous(), None if backward else linear.bias, thin, factor.contiguous(),  # type: ignore[union-attr]
            add, h, out, M, N, K, R, x.stride(0), thin.stride(0), BACKWARD=backward, GELU=gelu, WIDE=wide(x.dtype),
            ROWS=t.rows, COLUMNS=t.columns, INNER=t.inner, RANK=rank_block(R), GROUP=t.group,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip


def factor_gradients(x: Tensor, grad: Tensor, thin: Tensor, thin_grad: Tensor) -> tuple[Tensor, Tensor]:
    """dA `[r, K]` and dB `[N, r]`, float32: partial sums over fixed parts of the rows, then their sum in order."""
    from fdfo_engine.kernels.lora_linear import lora_linear_factors_kernel, lora_linear_sum_kernel

    (M, K), N, R = x.shape, grad.shape[1], thin.shape[1]
    split = FACTORS.rows * -(-M // (FACTORS.rows * SPLITS))
    splits, count, ranks = -(-M // split), R * (K + N), rank_block(R)
    partial = torch.empty(splits, count, dtype=torch.float32, device=x.device)
    out = torch.empty(count, dtype=torch.float32, device=x.device)
    tiles = -(-K // FACTORS.columns) + -(-N // FACTORS.columns)
    with torch.cuda.device_of(x):
        lora_linear_factors_kernel[(tiles, -(-R // ranks), splits)](
            x, grad, thin, thin_grad, partial, M, N, K, R, x.stride(0), grad.stride(0), thin.stride(0),
            thin_grad.stride(0), split, WIDE=wide(x.dtype), ROWS=FACTORS.rows, RANK=ranks, COLUMNS=FACTORS.columns,
            num_warps=FACTORS.warps, num_stages=FACTORS.stages,
        )  # fmt: skip
        lora_linear_sum_kernel[(-(-count // SUM_BLOCK),)](partial, out, count, splits, BLOCK=SUM_BLOCK)
    return out[: R * K].view(R, K), out[R * K :].view(N, R)


def wide(dtype: torch.dtype) -> bool:
    """Whether products take float32 operands: the interpreter's of bfloat16 are wrong."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _dispatch.interpreted())
