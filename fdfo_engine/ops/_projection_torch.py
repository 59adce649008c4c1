"""Adapted projections by torch's matrix products; what follows a product is a pass of its own.

In float32 the adapter is added to the weight for the time of a product where that is the smaller work: `W + s B A` is
as exact there as any sum. In shorter dtypes it would round most of the adapter away, so it stays a product of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fdfo_engine.ops._description import Computed, Description, Kept, Outputs
from fdfo_engine.ops.projection import Adapter, Operands, Projection


def supports(description: Description) -> list[str]:
    """Reasons why these products can't compute all of it; empty where they can."""
    ends = {type(p.end).__name__ for p in description.every() if p.end is not None}
    return [f"a library's product ends with its bias, not with {name}" for name in sorted(ends)]


def forward(description: Description, *, keep: bool) -> Computed:
    """Every projection of each stream; `keep` says that a backward follows, which needs nothing more here."""
    del keep
    streams, rank_products = [], []
    for x, projections in zip(description.by_stream(description.inputs), description.projections, strict=True):
        outs, rank_product = _stream_forward(x.flatten(0, 1), projections)
        streams.append([out.view(*x.shape[:2], out.shape[1]) for out in outs])
        rank_products.append(rank_product)
    return Computed(Outputs(streams, [], []), description.outline(), rank_products)


def _stream_forward(rows: Tensor, projections: Sequence[Projection]) -> tuple[list[Tensor], Tensor | None]:
    """Each projection of x as rows `[M, K]`, and the rank-r products of all adapters, `[M, ranks]`."""
    if merges(rows, projections):
        return [functional.linear(rows, merged_weight(p), p.bias) for p in projections], None
    adapters = [p.adapter for p in projections if p.adapter is not None]
    rank_products = rows @ _joined_a(adapters, rows.dtype).T if adapters else None
    outs = []
    for projection, rank_product in zip(projections, split_ranks(rank_products, projections), strict=True):
        out = functional.linear(rows, projection.weight, projection.bias)
        if projection.adapter is not None and rank_product is not None:
            out.addmm_(rank_product, projection.adapter.b.to(rows.dtype).T, alpha=projection.adapter.scale)
        outs.append(out)
    return outs, rank_products


class Layer(NamedTuple):
    """A projection whose output was used."""

    projection: Projection
    grad: Tensor
    """Of its output, `[M, N]`."""
    rank_product: Tensor | None
    """`x A^T`, where that was made."""
    rank_gradient: Tensor | None
    """`grad B`, where the gradient of x takes it; without the scale."""


def backward(
    description: Description, kept: Kept, grads: Sequence[Sequence[Tensor | None]],
    needed: Sequence[Sequence[Operands]], input_grads: Sequence[Tensor | None],
) -> list[list[Operands]]:  # fmt: skip
    """Gradients of each projection of each stream, where they are needed.

    Args:
        description: the call, with the tensors that the backward reads; x only where a parameter needs it.
        kept: what the forward left.
        grads: of each output `[B, S_i, N]`, or None where it was not used.
        needed: a flag for each tensor of each projection.
        input_grads: the gradient of each stream's x is written here, where one is given.
    """
    streams = zip(
        description.projections, grads, description.by_stream(description.inputs), kept.rank_products, needed,
        input_grads, strict=True,
    )  # fmt: skip
    return [_stream_backward(*stream) for stream in streams]


def _stream_backward(
    projections: Sequence[Projection], grads: Sequence[Tensor | None], x: Tensor | None, rank_products: Tensor | None,
    needed: Sequence[Operands], input_grad: Tensor | None,
) -> list[Operands]:  # fmt: skip
    layers = _used_layers(projections, grads, rank_products)
    used = [layer for layer in layers if layer is not None]
    if input_grad is not None:
        _input_gradient(used, input_grad)
    rows, found = None if x is None else x.flatten(0, 1), []
    for layer, flags in zip(layers, needed, strict=True):
        found.append(Operands() if layer is None else _operand_gradients(layer, rows, flags))
    return found


def _used_layers(
    projections: Sequence[Projection], grads: Sequence[Tensor | None], rank_products: Tensor | None
) -> list[Layer | None]:
    """None where an output was not used."""
    rows = [None if grad is None else grad.flatten(0, 1) for grad in grads]
    used = [(grad, projection) for grad, projection in zip(rows, projections, strict=True) if grad is not None]
    merged = not used or merges(used[0][0], [projection for _, projection in used])
    layers: list[Layer | None] = []
    for projection, grad, rank_product in zip(projections, rows, split_ranks(rank_products, projections), strict=True):
        if grad is None:
            layers.append(None)
            continue
        adapter = None if merged else projection.adapter
        rank_gradient = None if adapter is None else grad @ adapter.b.to(grad.dtype)
        layers.append(Layer(projection, grad, rank_product, rank_gradient))
    return layers


def _input_gradient(layers: Sequence[Layer], into: Tensor) -> None:
    """`sum_i g_i (W_i + s_i B_i A_i)`, accumulated in place; 0 where no gradient came."""
    if not layers:
        into.zero_()
        return
    merged = all(layer.rank_gradient is None for layer in layers)
    weights = [merged_weight(layer.projection) if merged else layer.projection.weight for layer in layers]
    first, size = layers[0].grad, into.shape[2]
    rows = into.view(-1, size) if into.is_contiguous() else into.new_empty(first.shape[0], size)
    torch.mm(first, weights[0], out=rows)
    for layer, weight in zip(layers[1:], weights[1:], strict=True):
        rows.addmm_(layer.grad, weight)
    if not merged:
        _add_adapters(layers, rows)
    if not into.is_contiguous():
        into.copy_(rows.view(into.shape))


def _add_adapters(layers: Sequence[Layer], rows: Tensor) -> None:
    """Adds `s_i (g_i B_i) A_i` of every adapter: those of one scale in one product."""
    by_scale: dict[float, list[tuple[Tensor, Adapter]]] = {}
    for layer in layers:
        if layer.projection.adapter is not None and layer.rank_gradient is not None:
            by_scale.setdefault(layer.projection.adapter.scale, []).append(
                (layer.rank_gradient, layer.projection.adapter)
            )
    for scale, members in by_scale.items():
        gradients = [rank_gradient for rank_gradient, _ in members]
        joined = gradients[0] if len(gradients) == 1 else torch.cat(gradients, 1)
        rows.addmm_(joined, _joined_a([adapter for _, adapter in members], rows.dtype), alpha=scale)


def _operand_gradients(layer: Layer, x: Tensor | None, needed: Operands) -> Operands:
    """Of weight, bias and both factors, where they are needed; those of the factors are float32."""
    bias = layer.grad.sum(0) if needed.bias else None
    if x is None:
        return Operands(bias=bias)
    factors = needed.lora_a or needed.lora_b
    by_whole = needed.weight or (factors and _whole_is_less(layer.grad, layer.projection))
    whole = layer.grad.T @ x if by_whole else None
    da, db = _factor_gradients(layer, x, whole, needed) if factors else (None, None)
    return Operands(whole if needed.weight else None, bias, da, db)


def _factor_gradients(
    layer: Layer, x: Tensor, whole: Tensor | None, needed: Operands
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dA and dB: in float32 of `G = g^T x`, where that was made; else by the rank-r gradient and the rank-r product."""
    adapter, da, db = layer.projection.adapter, None, None
    assert adapter is not None
    if whole is not None and whole.dtype == torch.float32:
        da = adapter.scale * (adapter.b.T @ whole) if needed.lora_a else None
        return da, adapter.scale * (whole @ adapter.a.T) if needed.lora_b else None
    if needed.lora_a:
        rank_gradient = layer.grad @ adapter.b if layer.rank_gradient is None else layer.rank_gradient.float()
        da = adapter.scale * (rank_gradient.T @ x.float())
    if needed.lora_b:
        rank_product = x @ adapter.a.T if layer.rank_product is None else layer.rank_product.float()
        db = adapter.scale * (layer.grad.float().T @ rank_product)
    return da, db


def merges(rows: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether `s B A` is cheaper to add to each weight than to apply to the rows."""
    if rows.dtype != torch.float32:
        return False
    return all(not p.rank or rows.shape[0] * sum(p.weight.shape) > p.weight.numel() for p in projections)


def merged_weight(projection: Projection) -> Tensor:
    """`W + s B A`, for one product."""
    adapter = projection.adapter
    if adapter is None:
        return projection.weight
    return torch.addmm(projection.weight, adapter.b, adapter.a, alpha=adapter.scale)


def _joined_a(adapters: Sequence[Adapter], dtype: torch.dtype) -> Tensor:
    """The first factors of all adapters, `[ranks, K]`: one product makes all rank-r products."""
    factors = [adapter.a for adapter in adapters]
    return (factors[0] if len(factors) == 1 else torch.cat(factors)).to(dtype)


def split_ranks(side_by_side: Tensor | None, projections: Sequence[Projection]) -> list[Tensor | None]:
    """Of `[M, ranks]` the columns that belong to each projection; None without an adapter."""
    if side_by_side is None or len(projections) == 1:
        return [side_by_side] * len(projections)
    parts = side_by_side.split_with_sizes([p.rank for p in projections], dim=1)
    return [part if projection.rank else None for part, projection in zip(parts, projections, strict=True)]


def _whole_is_less(grad: Tensor, projection: Projection) -> bool:
    """Whether `G = g^T x`, of which both factors' gradients are cheap, is less work than what it saves."""
    work = projection.weight.numel() * (grad.shape[0] + 2 * projection.rank)
    return grad.dtype == torch.float32 and work < 2 * projection.rank * grad.shape[0] * sum(projection.weight.shape)
