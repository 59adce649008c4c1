"""LayerNorm followed by a scale and shift of each sample: how a transformer block takes its time and prompt (adaLN)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from fdfo_engine.ops import _checks, _dispatch
from fdfo_engine.ops._checks import NORM_EPS
from fdfo_engine.ops._norm_streams import NormStream, modulated_norms

OFFERED = ("triton", "cpp", "torch")


@overload
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = NORM_EPS, backend: str | None = None
) -> Tensor: ...


@overload
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, scale2: Tensor, shift2: Tensor, eps: float = NORM_EPS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    eps: float = NORM_EPS,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`(x - mean) / sqrt(var + eps) * (1 + scale) + shift`, mean and variance of each token over its D elements.

    Differentiable once in `x` and in each modulation; gradients of modulations are summed over tokens, only where
    needed. Arithmetic is in float32, rounded once at each output and gradient.

    Args:
        x: tokens, `[B, S, D]`; float32, bfloat16 or float16. Strides of B and S may be any.
        scale, shift: the modulation, `[B, D]` of the dtype of `x`; may be views of a wider row.
        scale2, shift2: a second modulation of the same norm; both or neither.
        eps: added to the variance; >= 0.
        backend: None takes the fastest that runs on `x`'s device; a name of `ops.backends` forces one.

    Returns:
        Like `x`, contiguous; with a second modulation the tuple of both. Sums have a fixed order: two calls agree bit
        for bit.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device; one of scale2 and shift2.
        BackendUnavailableError: `backend` can't run on `x`'s device.

    Source: Peebles and Xie 2023 (adaLN); the second modulation is SD3.5-Medium's.
    """
    op = "layer_norm_modulate"
    _checks.tokens(op, "x", x)
    stream = NormStream(x, scale, shift, scale2=scale2, shift2=shift2)
    check_modulations(op, stream)
    eps = _checks.not_negative(op, "eps", eps)
    implementation = _dispatch.choose(op, OFFERED, x.device, forced=backend)
    if implementation == "torch":
        found = layer_norm_modulate_reference(x.float(), stream.modulations, eps, x.dtype)
    else:
        found = modulated_norms([stream], eps, implementation)[0][1:]
    return found[0] if scale2 is None else found


def layer_norm_modulate_reference(
    x: Tensor, modulations: Sequence[tuple[Tensor, Tensor]], eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The specification; x in float32, `modulations` are pairs of scale and shift."""
    normed = layer_norm(x, x.shape[-1:], eps=eps)
    found = [normed * (1 + scale.float()[:, None]) + shift.float()[:, None] for scale, shift in modulations]
    return tuple(wide.to(dtype) for wide in found)


def check_modulations(op: str, stream: NormStream) -> None:
    """Refuses modulations that do not fit the stream's tokens, or half of a second one."""
    x, scale2, shift2 = stream.x, stream.scale2, stream.shift2
    _checks.per_sample(op, "scale", stream.scale, x)
    _checks.per_sample(op, "shift", stream.shift, x)
    if scale2 is None and shift2 is None:
        return
    if scale2 is None or shift2 is None:
        missing = "scale2" if scale2 is None else "shift2"
        _checks.refuse(op, missing, None, "a tensor where the other of scale2 and shift2 is given")
    _checks.per_sample(op, "scale2", scale2, x)
    _checks.per_sample(op, "shift2", shift2, x)
