"""A block's output joins its residual stream through a gate of each sample."""

from __future__ import annotations

from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch

OFFERED = ("torch",)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """`x + gate * y`. Differentiable once in all three; the gradient of `gate` is summed over tokens, where needed.

    Arithmetic is in float32, rounded once at each output and gradient.

    Args:
        x: residual stream, `[B, S, D]`; float32, bfloat16 or float16. Strides of B and S may be any.
        y: the block's output, like `x`.
        gate: `[B, D]` of the dtype of `x`; may be a view of a wider row.
        backend: None takes the fastest that runs on `x`'s device; a name of `ops.backends` forces one.

    Returns:
        Like `x`, contiguous. Sums have a fixed order: two calls agree bit for bit.

    Raises:
        ValueError: an argument is of the wrong shape, dtype or device.
        BackendUnavailableError: `backend` can't run on `x`'s device.

    Source: Peebles and Xie 2023 (adaLN-Zero).
    """
    op = "gated_residual"
    check_residual(op, x, y, gate)
    _dispatch.choose(op, OFFERED, x.device, forced=backend)
    return gated_residual_reference(x, y, gate)


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The specification."""
    return (x.float() + gate.float()[:, None] * y.float()).to(x.dtype)


def check_residual(op: str, x: Tensor, y: Tensor, gate: Tensor) -> None:
    """Refuses what is no residual stream with a block's output and its gate."""
    _checks.tokens(op, "x", x)
    _checks.tensor(op, "y", y, (x.dtype,), shape=x.shape, device=x.device)
    _checks.per_sample(op, "gate", gate, x)
