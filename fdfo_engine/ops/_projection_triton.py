"""Adapted projections by Triton: in the accumulator of the base layer's product the adapter's product runs on, and so
does what follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fdfo_engine.ops import _compiled, _gelu, _projection_torch
from fdfo_engine.ops._description import Computed, Description, Kept, Outputs, packed_of
from fdfo_engine.ops._projection_launch import (
    BackwardLayer,
    BackwardStream,
    ForwardLayer,
    ForwardStream,
    Normed,
    factor_gradients,
    input_gradients,
    products,
    rank_gradients,
    rank_products,
)
from fdfo_engine.ops._projection_tiles import RANK_LAYERS
from fdfo_engine.ops._projection_torch import split_ranks
from fdfo_engine.ops.projection import End, Gelu, HeadNorm, IntoResidual, Operands, Projection

HEAD_SIZES = (16, 32, 64)
"""Of which every block of columns of the product holds whole heads."""
AnyStream = TypeVar("AnyStream", ForwardStream, BackwardStream)


def supports(description: Description) -> list[str]:
    """Reasons why these kernels can't compute all of it, or leave it to a library; empty where they do."""
    reasons = [] if all(x.numel() for x in description.inputs) else ["there are no tokens"]
    ends = [p.end for p in description.every()]
    if not description.adapted and not (_all_or_none(ends, Gelu) and takes_gelu(description.inputs[0].dtype)):
        reasons.append("no projection has an adapter: a plain product is left to a library")
    if _all_or_none(ends, Gelu) is None:
        reasons.append("a launch takes GELU of all its products or of none")
    if _all_or_none(ends, IntoResidual) is None:
        reasons.append("a launch adds all its products to residual streams or none")
    return reasons + _norm_refusals([end for end in ends if isinstance(end, HeadNorm)])


def _all_or_none(ends: Sequence[End | None], kind: type) -> bool | None:
    """Whether all are of this kind; None where some are and others are not."""
    found = {isinstance(end, kind) for end in ends}
    return found.pop() if len(found) == 1 else None


def _norm_refusals(norms: Sequence[HeadNorm]) -> list[str]:
    """Reasons why these norms can't be taken inside a product."""
    reasons, weights = [], [norm.weight for norm in norms if norm.weight is not None]
    if any(norm.rotary is not None for norm in norms):
        reasons.append("positions are embedded behind the product")
    if not weights:
        return reasons
    if len(weights) < len(norms):
        reasons.append("some queries or keys are normed, others are not")
    if norms[0].size not in HEAD_SIZES:
        reasons.append(f"heads are {norms[0].size} wide; blocks hold whole ones of {HEAD_SIZES}")
    if any(weight.requires_grad for weight in weights) or not all(norm.invertible for norm in norms):
        reasons.append("a norm's weight is trained or not invertible, so its argument has to be kept")
    return reasons


def takes_gelu(dtype: torch.dtype) -> bool:
    """Whether GELU is taken inside a product without an adapter, which saves a pass; float32 is left to cuBLAS."""
    return dtype != torch.float32


def forward(description: Description, *, keep: bool) -> Computed:
    """Every projection of each stream, with its end; `keep` says that a backward follows."""
    inputs = [_compiled.last_contiguous(x) for x in description.by_stream(description.inputs)]
    outputs, beside = _allocated(description, inputs, keep=keep)
    side_by_side, streams = [], []
    parts = description.by_projection(outputs), description.by_projection(beside)
    for x, projections, outs, left in zip(inputs, description.projections, *parts, strict=True):
        ranks = _empty_rank_products(x, projections)
        layers = zip(map(_readable, projections), split_ranks(ranks, projections), outs, left, strict=True)
        streams.append(ForwardStream(x, [ForwardLayer(*layer) for layer in layers]))
        side_by_side.append(ranks)
    _make_rank_products(streams)
    for launch in _launches(streams):
        products(launch)
    return Computed(outputs, beside, side_by_side)


def _empty_rank_products(x: Tensor, projections: Sequence[Projection]) -> Tensor | None:
    """For those of all adapters side by side, `[M, ranks]`; None without any."""
    ranks = sum(p.rank for p in projections)
    return x.new_empty(x.shape[0] * x.shape[1], ranks) if ranks else None


def _allocated(description: Description, inputs: Sequence[Tensor], *, keep: bool) -> tuple[Outputs, Outputs]:
    """Memory for all outputs, and if `keep` for what their ends leave beside them."""
    x, packing = inputs[0], packed_of(description.projections[0])
    sums = [p.end for p in description.every() if isinstance(p.end, IntoResidual)]
    outputs = Outputs(
        [_empty_outputs(*stream) for stream in zip(inputs, description.projections, strict=True)],
        [x.new_empty(x.shape[0], sum(description.tokens), p.width) for p in packing],
        [_compiled.empty_contiguous(end.residual) for end in sums],
    )
    beside = description.outline()
    if not keep:
        return outputs, beside
    if any(isinstance(p.end, Gelu) for p in description.every()):
        beside = beside._replace(streams=[[torch.empty_like(y) for y in of_stream] for of_stream in outputs.streams])
    rstds = [_empty_rstd(y, projection.end) for y, projection in zip(outputs.packed, packing, strict=True)]
    return outputs, beside._replace(packed=rstds)


def _empty_outputs(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """For those projections whose outputs stay with their stream."""
    alone = [p for p in projections if p.end is None or isinstance(p.end, Gelu)]
    return [x.new_empty(*x.shape[:2], p.width) for p in alone]


def _empty_rstd(y: Tensor, end: End | None) -> Tensor | None:
    """For 1 / rms of the heads of y, float32, where these are normed."""
    if not isinstance(end, HeadNorm) or end.weight is None:
        return None
    return y.new_empty(*y.shape[:2], y.shape[2] // end.size, dtype=torch.float32)


def _readable(projection: Projection) -> Projection:
    """With the last axes of residual and gate contiguous."""
    end = projection.end
    if not isinstance(end, IntoResidual):
        return projection
    read = IntoResidual(_compiled.last_contiguous(end.residual), _compiled.last_contiguous(end.gate))
    return projection.with_end(read)


def _make_rank_products(streams: Sequence[ForwardStream]) -> None:
    """Those of all layers with an adapter, `RANK_LAYERS` of each stream at a time."""
    adapted = [[layer for layer in stream.layers if layer.rank_product is not None] for stream in streams]
    for first in range(0, max(map(len, adapted)), RANK_LAYERS):
        next_layers = [layers[first : first + RANK_LAYERS] for layers in adapted]
        for launch in _launches(_with_layers(streams, next_layers)):
            rank_products(launch)


def _with_layers(streams: Sequence[AnyStream], layers: Sequence[Any]) -> list[AnyStream]:
    """The streams with these layers of theirs."""
    return [stream._replace(layers=of_stream) for stream, of_stream in zip(streams, layers, strict=True)]


def _launches(streams: Sequence[AnyStream]) -> Iterator[list[AnyStream]]:
    """The streams that one launch takes: all that have layers, if equally many; else each by itself."""
    filled = [stream for stream in streams if stream.layers]
    if len({len(stream.layers) for stream in filled}) == 1:
        yield filled
    else:
        yield from ([stream] for stream in filled)


def backward(
    description: Description, kept: Kept, grads: Sequence[Sequence[Tensor | None]],
    needed: Sequence[Sequence[Operands]], input_grads: Sequence[Tensor | None],
) -> list[list[Operands]]:  # fmt: skip
    """As `_projection_torch.backward`; the rank-r products hold the scale already."""
    before_gelu = _before_gelu(description, kept, grads)
    if not description.adapted:
        return _projection_torch.backward(description, kept, before_gelu, needed, input_grads)
    layers = _used_layers(description, kept, before_gelu, needed)
    inputs = description.by_stream(description.inputs)
    streams = [
        BackwardStream(x, into, [layer for layer in of_stream if layer is not None])
        for x, into, of_stream in zip(inputs, input_grads, layers, strict=True)
    ]
    _make_rank_gradients(streams)
    _write_input_gradients(streams)
    _make_factor_gradients(streams)
    found = []
    for x, of_stream, of_grads in zip(inputs, layers, grads, strict=True):
        found.append([_gradients_of(layer, x, grad) for layer, grad in zip(of_stream, of_grads, strict=True)])
    return found


def _before_gelu(
    description: Description, kept: Kept, grads: Sequence[Sequence[Tensor | None]]
) -> list[list[Tensor | None]]:
    """Gradients of what GELU was taken of; those of projections without it as they are."""
    arguments = description.by_projection(kept.beside)
    found = []
    for projections, of_arguments, of_grads in zip(description.projections, arguments, grads, strict=True):
        layers = zip(projections, of_arguments, of_grads, strict=True)
        found.append([_gelu_gradient(h, grad) if isinstance(p.end, Gelu) else grad for p, h, grad in layers])
    return found


def _gelu_gradient(h: Tensor, grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    rows = grad.flatten(0, 1).contiguous()
    before, _ = _gelu.backward(h.view(rows.shape), None, rows, "triton", inplace=False, activation=False)
    return before.view(grad.shape)


def _used_layers(
    description: Description, kept: Kept, grads: Sequence[Sequence[Tensor | None]], needed: Sequence[Sequence[Operands]]
) -> list[list[BackwardLayer | None]]:
    """Of each stream its layers; None where an output was not used."""
    outputs, beside = description.by_projection(kept.outputs), description.by_projection(kept.beside)
    found = []
    for projections, side_by_side, *of_stream in zip(
        description.projections, kept.rank_products, grads, needed, outputs, beside, strict=True
    ):
        parts = split_ranks(side_by_side, projections)
        layers = [_used_layer(*layer) for layer in zip(projections, parts, *of_stream, strict=True)]
        _give_memory([layer for layer in layers if layer is not None])
        found.append(layers)
    return found


def _used_layer(
    projection: Projection, rank_product: Tensor | None, grad: Tensor | None, needed: Operands, y: Tensor | None,
    rstd: Tensor | None,
) -> BackwardLayer | None:  # fmt: skip
    if grad is None:
        return None
    layer, end = BackwardLayer(projection, needed, _compiled.last_contiguous(grad), rank_product), projection.end
    if isinstance(end, IntoResidual):
        layer.gate = _compiled.last_contiguous(end.gate)
    elif isinstance(end, HeadNorm) and end.weight is not None:
        assert y is not None
        assert rstd is not None
        layer.normed = Normed(y, end.weight, rstd)
    return layer


def _give_memory(layers: Sequence[BackwardLayer]) -> None:
    """For rank-r gradients, which lie side by side, and for the product's gradient where an end changes it."""
    ranks = sum(layer.projection.rank for layer in layers)
    rows = layers[0].grad.shape[:2].numel() if layers else 0
    side_by_side = layers[0].grad.new_empty(rows, ranks) if ranks else None
    for layer, part in zip(layers, split_ranks(side_by_side, [n.projection for n in layers]), strict=True):
        layer.rank_gradient = part
        if layer.gate is not None or layer.normed is not None:
            layer.product_grad = layer.grad.new_empty(layer.grad.shape)


def _make_rank_gradients(streams: Sequence[BackwardStream]) -> None:
    """Those of all layers with an adapter. On the way, gradients of all layers go back through gates and norms."""
    read = [
        [layer for layer in stream.layers if layer.rank_gradient is not None or layer.product_grad is not None]
        for stream in streams
    ]
    for launch in _launches(_with_layers(streams, read)):
        rank_gradients(launch)
    for stream in streams:
        for layer in stream.layers:
            layer.grad = layer.grad if layer.product_grad is None else layer.product_grad


def _write_input_gradients(streams: Sequence[BackwardStream]) -> None:
    """Those of x, where they are needed; 0 where no output was used."""
    wanted = [stream for stream in streams if stream.input_grad is not None]
    for stream in wanted:
        if stream.input_grad is not None and not stream.layers:
            stream.input_grad.zero_()
    for launch in _launches(wanted):
        input_gradients(launch)


def _make_factor_gradients(streams: Sequence[BackwardStream]) -> None:
    """Those of adapters, where they are needed."""
    trained = [
        [layer for layer in stream.layers if layer.rank_product is not None and _is_trained(layer)]
        for stream in streams
    ]
    for launch in _launches(_with_layers(streams, trained)):
        factor_gradients(launch)


def _is_trained(layer: BackwardLayer) -> bool:
    return bool(layer.needed.lora_a or layer.needed.lora_b)


def _gradients_of(layer: BackwardLayer | None, x: Tensor | None, grad: Tensor | None) -> Operands:
    """Of the tensors of a projection, where they are needed; `grad` is that of its output."""
    if layer is None or grad is None:
        return Operands()
    needed = layer.needed
    da, db = (None, None) if layer.factors is None else layer.factors
    return Operands(
        weight=layer.grad.flatten(0, 1).T @ x.flatten(0, 1) if needed.weight and x is not None else None,
        bias=layer.grad.flatten(0, 1).sum(0) if needed.bias else None,
        lora_a=da if needed.lora_a else None,
        lora_b=db if needed.lora_b else None,
        residual=grad if needed.residual else None,
        gate=_gate_gradient(x, layer.projection, grad) if needed.gate and x is not None else None,
    )


def _gate_gradient(x: Tensor, projection: Projection, grad: Tensor) -> Tensor:
    """The product is made again for it: gates are trained seldom."""
    alone = Description([x], [x.shape[1]], shared=False, projections=[[projection.with_end(None)]])
    ((y,),) = forward(alone, keep=False).outputs.streams
    gradient: Tensor = (grad.float() * y.float()).sum(1).to(grad.dtype)
    return gradient


def gelu_product(x: Tensor, weight: Tensor, bias: Tensor | None, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """`gelu(x W^T + bias)` of rows `[M, K]`, and what GELU was taken of if `keep`.

    To a kernel each row is a sample of one token: it is compiled anew for another count of tokens, not of samples.
    """
    alone = Description([x[:, None]], [1], shared=False, projections=[[Projection(weight, bias, end=Gelu())]])
    made = forward(alone, keep=keep)
    ((out,),), ((h,),) = made.outputs.streams, made.beside.streams
    return out[:, 0], None if h is None else h[:, 0]


def gelu_gradient(grad: Tensor, weight: Tensor, h: Tensor) -> Tensor:
    """`(grad W) * gelu'(h)` of rows `[M, N]`: the backward of GELU and of the layer after it."""
    out = torch.empty_like(h)[:, None]
    layer = BackwardLayer(Projection(weight), Operands(), _compiled.last_contiguous(grad)[:, None], None)
    input_gradients([BackwardStream(None, out, [layer])], pre_activation=h)
    return out[:, 0]
