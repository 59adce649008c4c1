"""`gated_residual` and the `layer_norm_modulate` that follows it, in one pass over the tokens each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch
from fdfo_engine.ops._checks import NORM_EPS
from fdfo_engine.ops._choices import Shape, chosen
from fdfo_engine.ops._norm_streams import NormStream, modulated_norms
from fdfo_engine.ops.gated_residual import check_residual, gated_residual
from fdfo_engine.ops.layer_norm_modulate import check_modulations, layer_norm_modulate_reference

OFFERED = ("triton", "cpp", "torch")


class Residual(NamedTuple):
    """A residual stream `x + gate * y` whose sum is made where it is read next: by `joined`, or by a norm on its way.

    Without y and gate it is x: that sum is made already.
    """

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None

    def joined(self, *, backend: str | None = None) -> Tensor:
        """The sum: `gated_residual`."""
        if self.y is None or self.gate is None:
            return self.x
        return gated_residual(self.x, self.y, self.gate, backend=backend)

    def to_norm(self, scale: Tensor, shift: Tensor, **second: Tensor) -> NormStream:
        """What `gated_residual_norms` takes for the sum and its norm, modulated, once or twice."""
        return NormStream(self.x, scale, shift, self.y, self.gate, **second)


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
    op = "gated_residual_norm"
    check_residual(op, x, y, gate)
    stream = NormStream(x, scale, shift, y, gate, scale2, shift2)
    check_modulations(op, stream)
    return _run(op, [stream], eps, backend)[0]


def _shape(streams: Sequence[NormStream], **_settings: float) -> Shape:
    """Of each stream its tokens, and how many norms it has and whether a residual is added before them."""
    tokens = tuple(s.x.shape[1] for s in streams)
    kinds = tuple(f"{len(s.modulations)}{'' if s.y is None else 'r'}" for s in streams)
    return tokens, streams[0].x.shape[2], kinds, streams[0].x.dtype


@chosen(_shape, lambda streams, **_settings: _dispatch.candidates(OFFERED, streams[0].x.device))
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
    for i, stream in enumerate(streams):
        _check_stream(op, f"streams[{i}]", stream, streams[0].x)
    return _run(op, streams, eps, backend)


def _check_stream(op: str, name: str, stream: NormStream, like: Tensor) -> None:
    x, y, gate = stream.x, stream.y, stream.gate
    _checks.tokens(op, f"{name}.x", x)
    _checks.tensor(op, f"{name}.x", x, (like.dtype,), device=like.device)
    if len(x) != len(like) or x.shape[2] != like.shape[2]:
        _checks.refuse(op, f"{name}.x", list(x.shape), f"[{len(like)}, any, {like.shape[2]}], as of streams[0]")
    if y is not None and gate is not None:
        check_residual(op, x, y, gate)
    elif y is not None or gate is not None:
        missing = "y" if y is None else "gate"
        _checks.refuse(op, f"{name}.{missing}", None, "both y and gate, or neither")
    check_modulations(op, stream)


def _run(op: str, streams: Sequence[NormStream], eps: float, backend: str | None) -> list[tuple[Tensor, ...]]:
    eps = _checks.not_negative(op, "eps", eps)
    implementation = _dispatch.choose(op, OFFERED, streams[0].x.device, forced=backend)
    if implementation == "torch":
        return [gated_residual_norm_reference(stream, eps) for stream in streams]
    return modulated_norms(streams, eps, implementation)


def gated_residual_norm_reference(s: NormStream, eps: float) -> tuple[Tensor, ...]:
    """The specification. The rounding of x_new is straight-through: its gradient is not rounded on the way to y."""
    if s.y is None or s.gate is None:
        return s.x, *layer_norm_modulate_reference(s.x.float(), s.modulations, eps, s.x.dtype)
    wide = s.x.float() + s.gate.float()[:, None] * s.y.float()
    x_new = wide.to(s.x.dtype)
    rounded = wide + (x_new.float() - wide).detach()
    return x_new, *layer_norm_modulate_reference(rounded, s.modulations, eps, s.x.dtype)
