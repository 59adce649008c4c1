"""`gated_residual` and the `layer_norm_modulate` that follows it, in one pass over the tokens each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch
from fdfo_engine.ops._checks import NORM_EPS
from fdfo_engine.ops.gated_residual import check_residual
from fdfo_engine.ops.layer_norm_modulate import (
    OFFERED,
    layer_norm_modulate_reference,
    modulated_norms,
    modulations_of,
)

__all__ = ["OFFERED", "NormStream", "gated_residual_norm", "gated_residual_norms"]


class NormStream(NamedTuple):
    """Tokens of one kind with their modulation, and a second one or not; with y and gate or neither, as in
    `gated_residual_norm`.
    """

    x: Tensor
    scale: Tensor
    shift: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None
    scale2: Tensor | None = None
    shift2: Tensor | None = None


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    eps: float = NORM_EPS,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`x_new = x + gate * y`, rounded to the dtype of `x`, and `layer_norm_modulate(x_new, scale, shift, ...)`.

    Differentiable once in all tensors, whichever outputs are used; gradients of gate and modulations are summed over
    tokens, only where needed. Arithmetic is in float32, rounded once at each output and gradient.

    Args:
        x, y, gate: as in `gated_residual`.
        scale, shift, scale2, shift2, eps, backend: as in `layer_norm_modulate`.

    Returns:
        `(x_new, n)`, or `(x_new, n, n2)` with a second modulation; each like `x`, contiguous. Two calls agree bit for
        bit.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device; one of scale2 and shift2.
        BackendUnavailableError: `backend` can't run on `x`'s device.

    Source: Peebles and Xie 2023 (adaLN-Zero).
    """
    check_residual("gated_residual_norm", x, y, gate)
    stream = NormStream(x, scale, shift, y, gate, scale2, shift2)
    return _run("gated_residual_norm", [stream], eps, backend)[0]


def gated_residual_norms(
    streams: Sequence[NormStream], *, eps: float = NORM_EPS, backend: str | None = None
) -> list[tuple[Tensor, ...]]:
    """`gated_residual_norm` of one or two kinds of tokens at once, image and text: one launch on backend triton.

    Where a stream has no y and gate it is `layer_norm_modulate`.

    Args:
        streams: one or two, of one batch, width and dtype; each tensor as in `gated_residual_norm`.
        eps, backend: as in `layer_norm_modulate`.

    Returns:
        Of each stream `(x_new, n)`, or `(x_new, n, n2)`; x itself in the place of x_new where there is no gate. Two
        calls agree bit for bit.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device; one of y and gate, or one of
            scale2 and shift2; no stream, or more than two; streams that differ in batch, width or dtype.
        BackendUnavailableError: `backend` can't run on the tensors' device.

    Source: Peebles and Xie 2023 (adaLN-Zero); two kinds of tokens are SD3's (Esser et al. 2024).
    """
    op = "gated_residual_norms"
    _checks.stream_count(op, streams)
    for i, s in enumerate(streams):
        if (s.y is None) != (s.gate is None):
            _checks.refuse(op, f"streams[{i}].{'y' if s.y is None else 'gate'}", None, "both y and gate, or neither")
        _checks.tokens(op, "x", s.x)
        like = streams[0].x
        if len(s.x) != len(like) or s.x.shape[2] != like.shape[2] or s.x.dtype != like.dtype:
            wanted = f"[{len(like)}, any, {like.shape[2]}] of {like.dtype}, as of streams[0]"
            _checks.refuse(op, f"streams[{i}].x", f"{list(s.x.shape)} of {s.x.dtype}", wanted)
    return _run(op, streams, eps, backend)


def _run(op: str, streams: Sequence[NormStream], eps: float, backend: str | None) -> list[tuple[Tensor, ...]]:
    given: list[tuple[Tensor | None, ...]] = []
    for x, scale, shift, y, gate, scale2, shift2 in streams:
        if y is None or gate is None:
            _checks.tokens(op, "x", x)
        else:
            check_residual(op, x, y, gate)
        given.append((x, y, gate, *modulations_of(op, x, scale, shift, scale2, shift2)))
    eps = _checks.not_negative(op, "eps", eps)
    implementation = _dispatch.choose(op, OFFERED, streams[0].x.device, forced=backend)
    if implementation != "torch":
        return modulated_norms(given, eps, implementation)
    return [_reference(*stream, eps=eps) for stream in given]  # type: ignore[arg-type]


def _reference(
    x: Tensor, y: Tensor | None, gate: Tensor | None, *modulations: Tensor, eps: float
) -> tuple[Tensor, ...]:  # fmt: skip
    if y is None or gate is None:
        return x, *layer_norm_modulate_reference(x.float(), modulations, eps, x.dtype)
    return gated_residual_norm_reference(x, y, gate, modulations, eps)


def gated_residual_norm_reference(
    x: Tensor, y: Tensor, gate: Tensor, modulations: tuple[Tensor, ...], eps: float
) -> tuple[Tensor, ...]:
    """The specification. The rounding of x_new is straight-through: its gradient is not rounded on the way to y."""
    wide = x.float() + gate.float()[:, None] * y.float()
    x_new = wide.to(x.dtype)
    rounded = wide + (x_new.float() - wide).detach()
    return x_new, *layer_norm_modulate_reference(rounded, modulations, eps, x.dtype)
