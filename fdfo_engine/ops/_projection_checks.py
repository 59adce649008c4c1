"""What `adapted_projections` refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from fdfo_engine.ops import _checks
from fdfo_engine.ops._description import Description, packed_of
from fdfo_engine.ops.projection import Adapter, End, HeadNorm, IntoResidual, Packed, Projection

MASTER_DTYPES = (torch.float32,)
ENDS = get_args(End)


def check_projection(op: str, name: str, x: Tensor, projection: Projection) -> None:
    """Refuses what is no projection of x `[..., K]`; `name` is put before those of its parts."""
    _checks.tensor(op, "x", x, _checks.MODEL_DTYPES)
    if x.ndim < 1 or x.shape[-1] == 0:
        _checks.refuse(op, "x", list(x.shape), "[..., K], K at least 1")
    if not isinstance(projection, Projection):
        _checks.refuse(op, name.rstrip(".") or "projection", type(projection).__name__, "a Projection")
    weight, bias = projection.weight, projection.bias
    _checks.tensor(op, f"{name}weight", weight, (x.dtype,), device=x.device)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        _checks.refuse(op, f"{name}weight", list(weight.shape), f"[N, {x.shape[-1]}], the last axis that of x")
    if bias is not None:
        _checks.tensor(op, f"{name}bias", bias, (x.dtype,), shape=weight.shape[:1], device=x.device)
    if projection.adapter is not None:
        _check_adapter(op, f"{name}adapter", x, weight, projection.adapter)
    _check_end(op, f"{name}end", projection.end)


def _check_end(op: str, name: str, end: Any) -> None:
    if end is not None and not isinstance(end, ENDS):
        kinds = ", ".join(kind.__name__ for kind in ENDS)
        _checks.refuse(op, name, f"a {type(end).__name__}", f"None or one of {kinds}")


def _check_adapter(op: str, name: str, x: Tensor, weight: Tensor, adapter: Adapter) -> None:
    if not isinstance(adapter, Adapter):
        _checks.refuse(op, name, f"a {type(adapter).__name__}", "an Adapter or None")
    a, b = adapter.a, adapter.b
    _checks.tensor(op, f"{name}.a", a, MASTER_DTYPES, device=x.device)
    if a.ndim != 2 or a.shape[1] != x.shape[-1] or a.shape[0] == 0:
        _checks.refuse(op, f"{name}.a", list(a.shape), f"[r, {x.shape[-1]}], the last axis that of x")
    _checks.tensor(op, f"{name}.b", b, MASTER_DTYPES, shape=(weight.shape[0], a.shape[0]), device=x.device)
    if not isinstance(adapter.scale, int | float) or not math.isfinite(adapter.scale):
        _checks.refuse(op, f"{name}.scale", repr(adapter.scale), "a finite number")


def check_streams(op: str, inputs: Sequence[Tensor], streams: Sequence[Sequence[Any]], tokens: Any) -> None:
    """Refuses inputs, streams and counts of tokens that do not belong together."""
    for i, of_stream in enumerate(streams):
        if not isinstance(of_stream, Sequence):
            _checks.refuse(
                op, f"projections[{i}]", f"a {type(of_stream).__name__}", "a list: the Projections of a stream"
            )
    counts = [len(of_stream) for of_stream in streams]
    if not 1 <= len(counts) <= _checks.MAX_STREAMS or not all(counts):
        takes = f"one to {_checks.MAX_STREAMS} streams of at least one projection"
        _checks.refuse(op, "projections", f"of lengths {counts}", takes)
    if len(inputs) != (len(streams) if tokens is None else 1):
        _checks.refuse(op, "x", f"{len(inputs)} tensors", f"{len(streams)}, one a stream; one alone with tokens")
    for i, x in enumerate(inputs):
        _checks.tokens(op, f"x[{i}]", x)
        if x.shape[0] != inputs[0].shape[0] or x.shape[2] != inputs[0].shape[2]:
            takes = f"[{inputs[0].shape[0]}, any, {inputs[0].shape[2]}], as of x[0]"
            _checks.refuse(op, f"x[{i}]", list(x.shape), takes)
    if tokens is not None:
        _check_tokens(op, inputs[0].shape[1], streams, tokens)


def _check_tokens(op: str, most: int, streams: Sequence[Any], tokens: Sequence[int]) -> None:
    if len(tokens) != len(streams) or min(tokens) < 1 or sum(tokens) > most:
        _checks.refuse(op, "tokens", list(tokens), f"{len(streams)} counts, together at most {most}")


def check_description(op: str, description: Description) -> None:
    """Refuses projections and ends that do not fit their stream, or each other."""
    for i, (x, projections) in enumerate(
        zip(description.by_stream(description.inputs), description.projections, strict=True)
    ):
        for j, projection in enumerate(projections):
            name = f"projections[{i}][{j}]."
            check_projection(op, name, x, projection)
            if isinstance(projection.end, IntoResidual):
                _check_residual(op, f"{name}end.", x, projection, projection.end)
            elif isinstance(projection.end, HeadNorm):
                _check_norm(op, f"{name}end.", x, projection, projection.end)
    _check_packing(op, description)


def _check_residual(op: str, name: str, x: Tensor, projection: Projection, end: IntoResidual) -> None:
    shape = (*x.shape[:2], projection.width)
    _checks.tensor(op, f"{name}residual", end.residual, (x.dtype,), shape=shape, device=x.device)
    _checks.per_sample(op, f"{name}gate", end.gate, end.residual)


def _check_norm(op: str, name: str, x: Tensor, projection: Projection, end: HeadNorm) -> None:
    size = end.size
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _checks.MAX_HEAD_SIZE:
        _checks.refuse(op, f"{name}size", repr(size), f"an int in 1..{_checks.MAX_HEAD_SIZE}")
    if projection.width % size:
        _checks.refuse(op, f"{name}size", size, f"a divisor of {projection.width}, the columns")
    _checks.not_negative(op, f"{name}eps", end.eps)
    if end.weight is not None:
        dtypes = (x.dtype, torch.float32)
        _checks.tensor(op, f"{name}weight", end.weight, dtypes, shape=(size,), device=x.device)


def _check_packing(op: str, description: Description) -> None:
    """Refuses packed projections that have no counterpart in other streams."""
    packed = [packed_of(of_stream) for of_stream in description.projections]
    sizes = [[p.width for p in of_stream] for of_stream in packed]
    if any(of_stream != sizes[0] for of_stream in sizes):
        _checks.refuse(op, "projections", f"packed to sizes {sizes}", "as many of the same sizes in each stream")
    norms = [p.end for of_stream in packed for p in of_stream if isinstance(p.end, HeadNorm)]
    if norms:
        _check_order(op, packed, sizes[0])
        _check_alike(op, norms)


def _check_order(op: str, packed: Sequence[Sequence[Projection]], sizes: Sequence[int]) -> None:
    """Refuses norms of others than queries and keys."""
    kinds = [[type(p.end).__name__ for p in of_stream] for of_stream in packed]
    heads = [HeadNorm.__name__, HeadNorm.__name__, Packed.__name__]
    if any(of_stream != heads for of_stream in kinds) or len(set(sizes)) > 1:
        takes = f"{', '.join(heads)} of one size in each stream: queries, keys and values"
        _checks.refuse(op, "projections", f"packed as {kinds} of sizes {list(sizes)}", takes)


def _check_alike(op: str, norms: Sequence[HeadNorm]) -> None:
    """Refuses norms that differ in more than their weights."""
    if any((n.size, n.eps) != (norms[0].size, norms[0].eps) or n.rotary is not norms[0].rotary for n in norms):
        _checks.refuse(op, "projections", "with norms of different size, eps or rotary", "one of each")
    dtypes = {str(norm.weight.dtype) for norm in norms if norm.weight is not None}
    if len(dtypes) > 1:
        _checks.refuse(op, "projections", f"with weights of norms in {sorted(dtypes)}", "one dtype")
