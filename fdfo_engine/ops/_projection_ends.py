"""What follows a product, by a pass of its own: for ends that were not computed inside the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fdfo_engine.ops import _gelu
from fdfo_engine.ops._description import Description, Outputs
from fdfo_engine.ops.gated_residual_norm import Residual
from fdfo_engine.ops.projection import PACKING, Gelu, HeadNorm, IntoResidual, Projected, Projection
from fdfo_engine.ops.qk_rms_norm import QKV, qk_rms_norm


def with_ends(description: Description, kinds: tuple[type, ...], backend: str) -> Description:
    """`description` with its ends of these `kinds` alone; `finish` makes up for the others."""
    if all(p.end is None or isinstance(p.end, kinds) for p in description.every()):
        return description
    projections = [[_with_end(p, kinds, backend) for p in of_stream] for of_stream in description.projections]
    return replace(description, projections=projections)


def _with_end(projection: Projection, kinds: tuple[type, ...], backend: str) -> Projection:
    if projection.end is None or isinstance(projection.end, kinds):
        return projection
    adds_bias = isinstance(projection.end, Gelu) and _gelu.fuses_bias(backend, projection.weight.dtype)
    return replace(projection, bias=None if adds_bias else projection.bias, end=None)


def finish(description: Description, computed: Description, outputs: Outputs, backend: str) -> Projected:
    """The result of `description`, of which `computed`, perhaps without some ends, gave `outputs`."""
    if computed is description:
        return Projected(outputs.streams, outputs.packed, [Residual(x) for x in outputs.sums])
    made = computed.by_projection(outputs)
    streams, residuals = [], []
    for projections, products, ys in zip(description.projections, computed.projections, made, strict=True):
        alone = []
        for projection, product, y in zip(projections, products, ys, strict=True):
            if isinstance(projection.end, IntoResidual):
                residuals.append(Residual(projection.end.residual, y, projection.end.gate))
            elif isinstance(projection.end, Gelu):
                bias = projection.bias if product.bias is None else None
                alone.append(_gelu.behind_product(y, bias, backend))
            elif projection.end is None:
                alone.append(y)
        streams.append(alone)
    return Projected(streams, _packed(description, made, outputs.packed, backend), residuals)


def _packed(
    description: Description, made: Sequence[Sequence[Tensor]], packed: list[Tensor], backend: str
) -> list[Tensor]:
    """Queries, keys and values, or others to be packed; `packed` are values that lie so already."""
    to_pack = []
    for projections, ys in zip(description.projections, made, strict=True):
        to_pack.append([y for p, y in zip(projections, ys, strict=True) if isinstance(p.end, PACKING)])
    norms = [[p.end for p in of_stream if isinstance(p.end, HeadNorm)] for of_stream in description.projections]
    if not any(norms):
        return [ys[0] if len(ys) == 1 else torch.cat(ys, 1) for ys in zip(*to_pack, strict=True)]
    streams = []
    for (q_norm, k_norm), (q, k, v) in zip(norms, to_pack, strict=True):
        streams.append(QKV(q, k, None if packed else v, q_norm.weight, k_norm.weight))
    return _normed_heads(streams, norms[0][0], backend) + packed


def _normed_heads(streams: Sequence[QKV], norm: HeadNorm, backend: str) -> list[Tensor]:
    """Queries, keys, and values where these are not packed yet, `[B, sum S_i, N]`; all norms are like this one."""
    heads = qk_rms_norm(
        streams, head_size=norm.size, rotary=norm.rotary, eps=norm.eps, invertible=norm.invertible, backend=backend
    )
    return [part.flatten(2) for part in heads if part is not None]
