"""LayerNorm followed by a scale and shift of each sample: how a transformer block takes its time and prompt (adaLN)."""

from __future__ import annotations

from typing import overload

from torch import Tensor
from torch.nn.functional import layer_norm

from fdfo_engine.ops import _checks, _dispatch

OFFERED = ("torch",)
EPS = 1e-6


@overload
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = EPS, backend: str | None = None
) -> Tensor: ...


@overload
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, scale2: Tensor, shift2: Tensor, eps: float = EPS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    eps: float = EPS,
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
    modulations = modulations_of(op, x, scale, shift, scale2, shift2)
    eps = _checks.not_negative(op, "eps", eps)
    _dispatch.choose(op, OFFERED, x.device, forced=backend)
    found = layer_norm_modulate_reference(x, modulations, eps)
    return found[0] if scale2 is None else found


def layer_norm_modulate_reference(x: Tensor, modulations: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    """The specification; `modulations` are scale, shift and perhaps scale2, shift2."""
    normed = layer_norm(x.float(), x.shape[-1:], eps=eps)
    wide = [m.float()[:, None] for m in modulations]
    return tuple((normed * (1 + wide[i]) + wide[i + 1]).to(x.dtype) for i in range(0, len(wide), 2))


def modulations_of(
    op: str, x: Tensor, scale: Tensor, shift: Tensor, scale2: Tensor | None, shift2: Tensor | None
) -> tuple[Tensor, ...]:
    """The two or four modulations of `x`, checked."""
    _checks.per_sample(op, "scale", scale, x)
    _checks.per_sample(op, "shift", shift, x)
    if scale2 is None and shift2 is None:
        return scale, shift
    if scale2 is None or shift2 is None:
        missing = "scale2" if scale2 is None else "shift2"
        _checks.refuse(op, missing, None, "a tensor where the other of scale2 and shift2 is given")
    _checks.per_sample(op, "scale2", scale2, x)
    _checks.per_sample(op, "shift2", shift2, x)
    return scale, shift, scale2, shift2
