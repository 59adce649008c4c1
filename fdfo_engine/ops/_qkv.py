"""What `qk_rms_norm` is handed, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdfo_engine.ops import _checks
from fdfo_engine.ops._choices import Shape

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


def shape_of(streams: Sequence[QKV], *, head_size: int, rotary: Rotary | None = None, **_settings: Any) -> Shape:
    """What tells this use of the op from others: tokens of each stream, the width, and what is done to heads."""
    tokens, first = tuple(s.q.shape[1] for s in streams), streams[0]
    kind = ("normed" if first.q_weight is not None else "packed") + ("" if rotary is None else "-rotary")
    return tokens, first.q.shape[2], head_size, kind, first.q.dtype


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
    have_v = any(s.v is not None for s in streams)
    for i, stream in enumerate(streams):
        name = f"streams[{i}]"
        tokens = stream.q.shape[1] if isinstance(stream.q, Tensor) and stream.q.ndim == 3 else 0
        shape = (first.shape[0], tokens, first.shape[2])
        for part in ("q", "k", "v") if have_v else ("q", "k"):
            x = getattr(stream, part)
            _checks.tensor(op, f"{name}.{part}", x, (first.dtype,), shape=shape, device=first.device)
    check_norm_weights(op, streams, first, head_size)


def check_norm_weights(op: str, streams: Sequence[QKV], like: Tensor, head_size: int) -> None:
    """Refuses weights that are not `[E]`, on the device of `like`, and all in float32 or all in its dtype."""
    weights: dict[str, Any] = {}
    for i, stream in enumerate(streams):
        weights |= {f"streams[{i}].q_weight": stream.q_weight, f"streams[{i}].k_weight": stream.k_weight}
    given = {name: weight for name, weight in weights.items() if weight is not None}
    first = next(iter(given.values()), None)
    dtype = torch.float32 if isinstance(first, Tensor) and first.dtype == torch.float32 else like.dtype
    for name, weight in given.items():
        _checks.tensor(op, name, weight, (dtype,), shape=(head_size,), device=like.device)


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
