"""Launches of the Triton kernels in `kernels/lora_linear.py`.

A launch takes the projections of one or two streams of tokens, its layers, equally many of each stream. What belongs to
a stream goes in as a tuple with one entry a stream, what belongs to a layer as one with an entry a layer, stream by
stream. Where a layer lacks a tensor that another has, that one's stands in for it and is not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdfo_engine.ops import _compiled
from fdfo_engine.ops._projection_tiles import (
    FACTORS,
    SPLITS,
    SUM_BLOCK,
    Tile,
    rank_block,
    rank_tile,
    tile_of,
    wide,
)
from fdfo_engine.ops.projection import Gelu, HeadNorm, IntoResidual, Operands, Projection

Tuple = tuple[Any, ...]


class ForwardLayer(NamedTuple):
    """A projection, and what its launches write."""

    projection: Projection
    rank_product: Tensor | None
    """`s x A^T`, `[M, r]`, with an adapter."""
    out: Tensor
    """`[B, S, N]`, strides of B any."""
    beside: Tensor | None
    """For what GELU is taken of, like `out`, or 1 / rms `[B, S, heads]` of the norm; None where nobody will read it."""


class ForwardStream(NamedTuple):
    """One kind of tokens: x `[B, S, K]`, and layers of it."""

    x: Tensor
    layers: Sequence[ForwardLayer]


class Normed(NamedTuple):
    """What a norm of heads inside a product left for its backward."""

    y: Tensor
    """The output, `[B, S, N]`, strides of B any."""
    weight: Tensor
    rstd: Tensor
    """1 / rms, `[B, S, heads]`."""


@dataclass
class BackwardLayer:
    """A projection whose output was used, and what the steps of its backward make one after the other."""

    projection: Projection
    needed: Operands
    grad: Tensor
    """Of the output, `[B, S, N]`; once the end's gradient is taken, of the product."""
    rank_product: Tensor | None
    rank_gradient: Tensor | None = None
    """`s g B`, `[M, r]`, of the product's gradient g."""
    gate: Tensor | None = None
    """Of a residual sum, `[B, N]`."""
    normed: Normed | None = None
    product_grad: Tensor | None = None
    """Memory for the gradient of the product, where its end changes that."""
    factors: tuple[Tensor, Tensor] | None = None
    """dA and dB."""


class BackwardStream(NamedTuple):
    """One kind of tokens: x where a parameter needs it, memory for its gradient if that is needed, and used layers."""

    x: Tensor | None
    input_grad: Tensor | None
    layers: Sequence[BackwardLayer]


def rank_products(streams: Sequence[ForwardStream]) -> None:
    """`s x A^T` of each layer, which all have an adapter."""
    from fdfo_engine.kernels.lora_linear import lora_linear_rank_product_kernel  # triton: only where it runs

    xs, layers = [stream.x for stream in streams], _layers(streams)
    projections, t = [layer.projection for layer in layers], rank_tile(xs[0].dtype)
    ranks = _column(projections, "rank")
    block = rank_block(max(ranks))
    with torch.cuda.device_of(xs[0]):  # triton launches on the current device, not on the tensor's
        lora_linear_rank_product_kernel[_row_tiles(xs, t), -(-max(ranks) // block)](
            tuple(xs), _contiguous(_column(projections, "lora_a")), _column(layers, "rank_product"), *_tokens(xs),
            _rank_strides(streams, "rank_product"), ranks, _column(projections, "scale"), xs[0].shape[2],
            **_counts(streams), WIDE=wide(xs[0].dtype), ROWS=t.rows, RANK=block, INNER=t.inner, num_warps=t.warps,
            num_stages=t.stages,
        )  # fmt: skip


def products(streams: Sequence[ForwardStream]) -> None:
    """`x W^T + rank_product B^T + bias` of each layer, and their end, which is of one kind in a launch.

    With norms, those of all but the last layer of each stream.
    """
    from fdfo_engine.kernels.lora_linear import lora_linear_kernel  # triton: only where it runs

    xs, layers = [stream.x for stream in streams], _layers(streams)
    projections = [layer.projection for layer in layers]
    end, ranks = projections[0].end, _column(projections, "rank")
    t = tile_of(xs[0], more=isinstance(end, Gelu | IntoResidual))
    eps, head = (end.eps, end.size) if isinstance(end, HeadNorm) and end.weight is not None else (0.0, 0)
    with torch.cuda.device_of(xs[0]):
        lora_linear_kernel[(sum(_tiles(layer.out, t) for layer in layers),)](
            tuple(xs), _contiguous(_column(projections, "weight")), _biases(projections),
            _stood_in(_column(layers, "rank_product")), _contiguous(_stood_in(_column(projections, "lora_b"))),
            *_end_tensors(layers), _column(layers, "out"), *_tokens(xs), _rank_strides(streams, "rank_product"),
            _column(projections, "width"), ranks, *_residual_strides(projections),
            tuple(map(_sample_stride, _column(layers, "out"))), xs[0].shape[2], eps,
            **_counts(streams), HEAD=head, GELU=isinstance(end, Gelu), **_blocks(xs[0], t, ranks),
        )  # fmt: skip


def _end_tensors(layers: Sequence[ForwardLayer]) -> Sequence[Tuple]:
    """What GELU was taken of, residuals, gates, and weights and 1 / rms of norms; Nones of what the end has not."""
    none, ends = (None,) * len(layers), [layer.projection.end for layer in layers]
    beside = _stood_in(_column(layers, "beside"))
    if isinstance(ends[0], Gelu):
        return beside, none, none, none, none
    if isinstance(ends[0], IntoResidual):
        return none, _column(ends, "residual"), _column(ends, "gate"), none, none
    weights = [end.weight if isinstance(end, HeadNorm) else None for end in ends]
    return none, none, none, _contiguous(_stood_in(weights)), beside


def _residual_strides(projections: Sequence[Projection]) -> Sequence[Tuple]:
    """Strides of samples and rows of each residual, and of rows of its gate."""
    ends = [p.end for p in projections if isinstance(p.end, IntoResidual)]
    if not ends:
        return ((0,) * len(projections),) * 3
    residuals, gates = _column(ends, "residual"), _column(ends, "gate")
    return tuple(map(_sample_stride, residuals)), tuple(map(_row_stride, residuals)), tuple(map(_sample_stride, gates))


def rank_gradients(streams: Sequence[BackwardStream]) -> None:
    """`s g B` of each layer into its `rank_gradient`, and g into its `product_grad`, where these are."""
    from fdfo_engine.kernels.lora_linear import lora_linear_rank_gradient_kernel  # triton: only where it runs

    layers, firsts = _layers(streams), [stream.layers[0].grad for stream in streams]
    projections, normed = [layer.projection for layer in layers], _column(layers, "normed")
    t = rank_tile(firsts[0].dtype, through_end=any(layer.product_grad is not None for layer in layers))
    rank, head = max(1, *_column(projections, "rank")), _head_size(normed)
    block = rank_block(rank)
    with torch.cuda.device_of(firsts[0]):
        lora_linear_rank_gradient_kernel[_row_tiles(firsts, t), -(-rank // block), len(streams[0].layers)](
            _column(layers, "grad"), _second_factors(layers), _stood_in(_column(layers, "rank_gradient"), firsts[0]),
            _column(layers, "gate"), *_norm_tensors(normed), _stood_in(_column(layers, "product_grad")),
            firsts[0].shape[0], tuple(first.shape[1] for first in firsts),
            _rank_strides(streams, "rank_gradient"), *_gradients(layers),
            tuple(map(_sample_stride, _column(layers, "gate"))),
            tuple(0 if n is None else _sample_stride(n.y) for n in normed), _column(projections, "scale"),
            **_counts(streams), NORMED=_bits(n is not None for n in normed), HEAD=head, WIDE=wide(firsts[0].dtype),
            ROWS=t.rows, RANK=block, INNER=max(t.inner, head), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip


def input_gradients(streams: Sequence[BackwardStream], *, pre_activation: Tensor | None = None) -> None:
    """`sum_i g_i W_i + (s_i g_i B_i) A_i` of each stream, times GELU's slope at `pre_activation`, into `input_grad`."""
    from fdfo_engine.kernels.lora_linear import lora_linear_input_kernel  # triton: only where it runs

    layers, into = _layers(streams), _column(streams, "input_grad")
    projections, K = [layer.projection for layer in layers], into[0].shape[2]
    weights = [_compiled.last_contiguous(p.weight) for p in projections]  # perhaps columns of a wider one
    t = tile_of(into[0], more=len(streams[0].layers) > 1 or pre_activation is not None)
    with torch.cuda.device_of(into[0]):
        lora_linear_input_kernel[(_row_tiles(into, t) * -(-K // t.columns),)](
            _column(layers, "grad"), tuple(weights), _stood_in(_column(layers, "rank_gradient")),
            _contiguous(_stood_in(_column(projections, "lora_a"))), pre_activation, into, into[0].shape[0],
            tuple(dx.shape[1] for dx in into), _rank_strides(streams, "rank_gradient"),
            tuple(map(_sample_stride, into)), *_gradients(layers), tuple(weight.stride(0) for weight in weights), K,
            **_counts(streams), **_blocks(into[0], t, _column(projections, "rank")),
        )  # fmt: skip


def factor_gradients(streams: Sequence[BackwardStream]) -> None:
    """dA `[r, K]` and dB `[N, r]` of each layer, float32: partial sums over parts of the rows, then their sum."""
    from fdfo_engine.kernels.lora_linear import lora_linear_factors_kernel, lora_linear_sum_kernel

    layers, xs = _layers(streams), [_compiled.last_contiguous(x) for x in _column(streams, "x")]
    K, ranks = xs[0].shape[2], [layer.projection.rank for layer in layers]
    sizes = [layer.grad.shape[2] for layer in layers]
    elements = [rank * size for rank, N in zip(ranks, sizes, strict=True) for size in (K, N)]
    total, block = sum(elements), rank_block(max(ranks))
    partial = torch.empty(SPLITS, total, dtype=torch.float32, device=xs[0].device)
    out = torch.empty(total, dtype=torch.float32, device=xs[0].device)
    tiles = sum(-(-K // FACTORS.columns) + -(-N // FACTORS.columns) for N in sizes)
    with torch.cuda.device_of(out):
        lora_linear_factors_kernel[(tiles, -(-max(ranks) // block), SPLITS)](
            tuple(xs), _column(layers, "grad"), _column(layers, "rank_product"), _column(layers, "rank_gradient"),
            partial, *_tokens(xs), _rank_strides(streams, "rank_product"), _rank_strides(streams, "rank_gradient"),
            *_gradients(layers), K, total, **_counts(streams), SPLITS=SPLITS, WIDE=wide(xs[0].dtype),
            ROWS=FACTORS.rows, RANK=block, COLUMNS=FACTORS.columns, num_warps=FACTORS.warps, num_stages=FACTORS.stages,
        )  # fmt: skip
        lora_linear_sum_kernel[(-(-total // SUM_BLOCK),)](partial, out, total, SPLITS, BLOCK=SUM_BLOCK)
    parts = iter(out.split(elements))
    for layer, rank in zip(layers, ranks, strict=True):
        layer.factors = next(parts).view(rank, K), next(parts).view(-1, rank)


def _layers(streams: Sequence[Any]) -> list[Any]:
    """Of all streams, one stream after the other."""
    return [layer for stream in streams for layer in stream.layers]


def _column(records: Sequence[Any], name: str) -> Tuple:
    """Field `name` of each record: what a kernel takes as a tuple."""
    return tuple(map(attrgetter(name), records))


def _counts(streams: Sequence[Any]) -> dict[str, int]:
    """Of streams, and of layers of each."""
    return {"STREAMS": len(streams), "LAYERS": len(streams[0].layers)}


def _second_factors(layers: Sequence[BackwardLayer]) -> Tuple:
    """Any float32 where there is no adapter at all: of a rank of 0 nothing is read."""
    factors = [layer.projection.lora_b for layer in layers]
    return _contiguous(_stood_in(factors, layers[0].grad.new_empty(1, dtype=torch.float32)))


def _biases(projections: Sequence[Projection]) -> Tuple:
    """Zeros where one is missing; Nones where all are."""
    if all(p.bias is None for p in projections):
        return (None,) * len(projections)
    return _contiguous(p.weight.new_zeros(p.width) if p.bias is None else p.bias for p in projections)


def _norm_tensors(normed: Sequence[Normed | None]) -> Sequence[Tuple]:
    """Weights, outputs and 1 / rms of the norms of each layer."""
    weights = _stood_in(None if n is None else n.weight for n in normed)
    outputs = _stood_in(None if n is None else n.y for n in normed)
    return _contiguous(weights), outputs, _stood_in(None if n is None else n.rstd for n in normed)


def _head_size(normed: Sequence[Normed | None]) -> int:
    """Of the norms; 1 without any."""
    sizes = [n.y.shape[2] // n.rstd.shape[2] for n in normed if n is not None]
    return sizes[0] if sizes else 1


def _bits(flags: Iterable[bool]) -> int:
    """Bit i is flag i."""
    return sum(flag << i for i, flag in enumerate(flags))


def _stood_in(tensors: Iterable[Tensor | None], other: Tensor | None = None) -> Tuple:
    """A present one, or `other`, stands in for each that is missing; Nones where there is neither."""
    given = list(tensors)
    present = [t for t in given if t is not None]
    substitute = present[0] if present else other
    return tuple(substitute if t is None else t for t in given)


def _contiguous(tensors: Iterable[Tensor | None]) -> Tuple:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _row_counts(xs: Sequence[Tensor]) -> list[int]:
    """Rows of each stream."""
    return [x.shape[0] * x.shape[1] for x in xs]


def _row_tiles(xs: Sequence[Tensor], t: Tile) -> int:
    """Tiles of the rows of all streams."""
    return sum(-(-rows // t.rows) for rows in _row_counts(xs))


def _tiles(out: Tensor, t: Tile) -> int:
    """Of the rows and columns of an output."""
    return -(-out.shape[0] * out.shape[1] // t.rows) * -(-out.shape[2] // t.columns)


def _sample_stride(x: Tensor | None) -> int:
    """Stride from sample to sample; 0 where there is one, whose stride may be past 32 bits, or no tensor."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _row_stride(x: Tensor) -> int:
    """Stride from token to token."""
    return x.stride(1)


def _tokens(xs: Sequence[Tensor]) -> Sequence[Any]:
    """Samples, and of each stream tokens a sample and strides of samples and rows.

    Not rows: Triton compiles a kernel again where a number in a tuple becomes a multiple of 16, or 1.
    """
    tokens = tuple(x.shape[1] for x in xs)
    return xs[0].shape[0], tokens, tuple(map(_sample_stride, xs)), tuple(map(_row_stride, xs))


def _gradients(layers: Sequence[BackwardLayer]) -> Sequence[Tuple]:
    """Columns, ranks, and strides of samples and rows, of each layer's gradient."""
    grads, ranks = _column(layers, "grad"), tuple(layer.projection.rank for layer in layers)
    return tuple(g.shape[2] for g in grads), ranks, tuple(map(_sample_stride, grads)), tuple(map(_row_stride, grads))


def _rank_strides(streams: Sequence[Any], name: str) -> tuple[int, ...]:
    """Stride of rows of each stream's `rank_product`s, or other field, which lie in one tensor; 0 where it has none."""
    strides = []
    for stream in streams:
        present = [tensor for tensor in _column(stream.layers, name) if tensor is not None]
        strides.append(present[0].stride(0) if present else 0)
    return tuple(strides)


def _blocks(x: Tensor, t: Tile, ranks: Sequence[int]) -> dict[str, Any]:
    """Constants and launch options of a large product."""
    return {
        "WIDE": wide(x.dtype), "ROWS": t.rows, "COLUMNS": t.columns, "INNER": t.inner, "GROUP": t.group,
        "RANK": rank_block(max(ranks)), "num_warps": t.warps, "num_stages": t.stages,
    }  # fmt: skip
