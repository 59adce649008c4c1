"""A block's output joins its residual stream through a gate of each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfo_engine.ops import _checks, _compiled, _dispatch
from fdfo_engine.ops._choices import Shape, chosen
from fdfo_engine.ops._norm_streams import TOKENS, tile

OFFERED = ("triton", "cpp", "torch")


def _shape(x: Tensor, _y: Tensor, _gate: Tensor) -> Shape:
    return x.shape[1], x.shape[2], x.dtype


@chosen(_shape, lambda x, _y, _gate: _dispatch.candidates(OFFERED, x.device))
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
    implementation = _dispatch.choose(op, OFFERED, x.device, forced=backend)
    if implementation == "torch":
        return gated_residual_reference(x, y, gate)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or gate.requires_grad):
        found: Tensor = _GatedResidual.apply(x, y, gate, implementation)
        return found
    return _forward(x, y, gate, implementation)


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The specification."""
    return (x.float() + gate.float()[:, None] * y.float()).to(x.dtype)


def check_residual(op: str, x: Tensor, y: Tensor, gate: Tensor) -> None:
    """Refuses what is no residual stream with a block's output and its gate."""
    _checks.tokens(op, "x", x)
    _checks.tensor(op, "y", y, (x.dtype,), shape=x.shape, device=x.device)
    _checks.per_sample(op, "gate", gate, x)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
        _, needs_y, needs_gate, _ = ctx.needs_input_grad
        ctx.save_for_backward(gate if needs_y else None, y if needs_gate else None)
        ctx.backend = backend
        return _forward(x, y, gate, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gate, y = map(_compiled.last_contiguous, ctx.saved_tensors)
        dy = d_gate = None
        if gate is not None or y is not None:
            inner = _compiled.last_contiguous(upstream)
            dy = None if gate is None else _compiled.empty_contiguous(inner)
            if upstream.numel():
                d_gate = _BACKWARD[ctx.backend](inner, y, gate, dy)
            elif y is not None:
                d_gate = torch.zeros(len(y), y.shape[2], dtype=y.dtype, device=y.device)
        return upstream, dy, d_gate, None


def _forward(x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
    out = _compiled.empty_contiguous(x)
    if out.numel():
        contiguous = _compiled.last_contiguous
        _FORWARD[backend](contiguous(x), contiguous(y), contiguous(gate), out)
    return out


def _forward_cpp(x: Tensor, y: Tensor, gate: Tensor, out: Tensor) -> None:
    arguments = _compiled.arguments(
        "GatedResidual", x=_compiled.strided(x), y=_compiled.strided(y), gate=_compiled.row_strided(gate),
        out=out.data_ptr(), shape=x.shape, number=_compiled.NUMBERS[x.dtype],
    )  # fmt: skip
    _compiled.call("gated_residual_forward", x.device, arguments)


def _backward_cpp(upstream: Tensor, y: Tensor | None, gate: Tensor | None, dy: Tensor | None) -> Tensor | None:
    B, _, D = upstream.shape
    d_gate = None if y is None else torch.empty(B, D, dtype=upstream.dtype, device=upstream.device)
    arguments = _compiled.arguments(
        "GatedResidualBackward", upstream=_compiled.strided(upstream), y=_compiled.strided(y),
        gate=_compiled.row_strided(gate), dy=_compiled.address(dy), d_gate=_compiled.address(d_gate),
        shape=upstream.shape, number=_compiled.NUMBERS[upstream.dtype],
    )  # fmt: skip
    _compiled.call("gated_residual_backward", upstream.device, arguments)
    return d_gate


def _forward_triton(x: Tensor, y: Tensor, gate: Tensor, out: Tensor) -> None:
    from fdfo_engine.kernels.gated_residual import gated_residual_forward_kernel  # triton: only where it runs

    B, S, D = x.shape
    block, warps = tile(D)
    strides = *x.stride()[:2], *y.stride()[:2], gate.stride(0)
    with torch.cuda.device_of(x):  # triton launches on the current device, not on the tensor's
        gated_residual_forward_kernel[(B * S,)](
            x, y, gate, out, S, D, *strides, BLOCK=block, num_warps=warps, enable_fp_fusion=False
        )


def _backward_triton(upstream: Tensor, y: Tensor | None, gate: Tensor | None, dy: Tensor | None) -> Tensor | None:
    from fdfo_engine.kernels.gated_residual import gated_residual_backward_kernel

    (B, S, D), tokens = upstream.shape, 1 if y is None else TOKENS
    partial = torch.empty(B, -(-S // tokens), D, dtype=torch.float32, device=upstream.device)
    block, warps = tile(D)
    strides = *upstream.stride()[:2], *_compiled.strided(y)[1:], _compiled.row_strided(gate)[1]
    with torch.cuda.device_of(upstream):
        gated_residual_backward_kernel[(B * partial.shape[1],)](
            upstream, y, gate, dy, partial, S, D, *strides, DY=dy is not None, SUM_GATE=y is not None,
            TOKENS=tokens, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return None if y is None else partial.sum(1).to(upstream.dtype)


_FORWARD = {"cpp": _forward_cpp, "triton": _forward_triton}
_BACKWARD = {"cpp": _backward_cpp, "triton": _backward_triton}
