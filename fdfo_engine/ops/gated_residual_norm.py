"""`gated_residual` and the `layer_norm_modulate` that follows it, in one pass over the tokens each way."""

from __future__ import annotations

from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch
from fdfo_engine.ops.gated_residual import check_residual
from fdfo_engine.ops.layer_norm_modulate import (
    EPS,
    OFFERED,
    layer_norm_modulate_reference,
    modulated_norm,
    modulations_of,
)

__all__ = ["OFFERED", "gated_residual_norm"]


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    eps: float = EPS,
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
    """
    op = "gated_residual_norm"
    check_residual(op, x, y, gate)
    modulations = modulations_of(op, x, scale, shift, scale2, shift2)
    eps = _checks.not_negative(op, "eps", eps)
    implementation = _dispatch.choose(op, OFFERED, x.device, forced=backend)
    if implementation != "torch":
        return modulated_norm(x, y, gate, modulations, eps, implementation)
    return gated_residual_norm_reference(x, y, gate, modulations, eps)


def gated_residual_norm_reference(
    x: Tensor, y: Tensor, gate: Tensor, modulations: tuple[Tensor, ...], eps: float
) -> tuple[Tensor, ...]:
    """The specification. The rounding of x_new is straight-through: its gradient is not rounded on the way to y."""
    wide = x.float() + gate.float()[:, None] * y.float()
    x_new = wide.to(x.dtype)
    rounded = wide + (x_new.float() - wide).detach()
    return x_new, *layer_norm_modulate_reference(rounded, modulations, eps, x.dtype)
