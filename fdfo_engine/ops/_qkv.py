"""What `qk_rms_norm` is handed, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdfo_engine.ops import _checks

Rotary = tuple[Tensor, Tensor]


class QKV(NamedTuple):
    """Projections of one token stream, and the weights of its norms; without a weight, that one is not normed.

    v is None where the values of all streams are packed already.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None


def check_sizes(op: str, streams: Sequence[QKV], head_size: int, eps: float) -> float:
    """`eps` as a float; refuses it and other sizes out of range."""
    _checks.stream_count(op, streams)
    _checks.head_size(op, head_size)
    return _checks.not_negative(op, "eps", eps)


def check_streams(op: str, streams: Sequence[QKV], head_size: int) -> None:
    """Refuses streams whose tensors do not fit each other."""
    first = streams[0].q
    _checks.tensor(op, "streams[0].q", first, _checks.MODEL_DTYPES)
    if first.ndim != 3 or first.shape[2] == 0 or first.shape[2] % head_size:
        _checks.refuse(op, "streams[0].q", list(first.shape), f"[B, S, H * {head_size}]")
    dtypes, device = (first.dtype,), first.device
    weights = [w for s in streams for w in (s.q_weight, s.k_weight) if isinstance(w, Tensor)]
    of_weights = (weights[0].dtype,) if weights and weights[0].dtype == torch.float32 else dtypes
    names = ("q", "k") if all(s.v is None for s in streams) else ("q", "k", "v")
    for i, stream in enumerate(streams):
        tokens = stream.q.shape[1] if isinstance(stream.q, Tensor) and stream.q.ndim == 3 else 0
        for name in names:
            shape = (first.shape[0], tokens, first.shape[2])
            _checks.tensor(op, f"streams[{i}].{name}", getattr(stream, name), dtypes, shape=shape, device=device)
        for name in ("q_weight", "k_weight"):
            weight = getattr(stream, name)
            if weight is not None:
                _checks.tensor(op, f"streams[{i}].{name}", weight, of_weights, shape=(head_size,), device=device)


def check_rotary(op: str, rotary: Rotary, streams: Sequence[QKV], head_size: int) -> None:
    """Refuses tables that are no constants `[sum S_i, E]`."""
    if head_size % 2:
        _checks.refuse(op, "head_size", head_size, "an even number with rotary")
    if not isinstance(rotary, Sequence) or len(rotary) != 2:
        _checks.refuse(op, "rotary", type(rotary).__name__, "a pair of tensors, cos and sin")
    shape = (sum(s.q.shape[1] for s in streams), head_size)
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        _checks.tensor(op, f"rotary {name}", table, (torch.float32,), shape=shape, device=streams[0].q.device)
        if table.requires_grad:
            _checks.refuse(op, f"rotary {name}", "one that requires a gradient", "constants")
