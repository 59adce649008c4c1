"""The two linear layers of a transformer block with GELU between them.

The products are torch's own, but for those of backend triton in 16 bits that take GELU, or its slope, before their
output is stored: that saves a pass over the wide tensor each way, and has not been measured against cuBLAS yet. The
specification is `feed_forward_reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fdfo_engine.ops import _checks, _dispatch, _gelu, _projection_triton
from fdfo_engine.ops._choices import Shape, chosen

OFFERED = ("triton", _dispatch.LIBRARY, "cpp", "torch")


def _shape(x: Tensor, w1: Tensor, _b1: Tensor | None, w2: Tensor, *_rest: Any, **_settings: Any) -> Shape:
    """Tokens, and the widths that they take."""
    return x.shape[-2], (x.shape[-1], len(w1), *w2.shape), x.dtype


@chosen(_shape, lambda x, *_rest, **_settings: _dispatch.candidates(OFFERED, x.device))
def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    beside: Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`gelu(x W1^T + b1) W2^T + b2`, GELU by tanh; with `beside`, `[beside, gelu(...)] W2^T + b2`.

    Sums are float32; GELU's output and the second layer's are rounded to the dtype of `x`, and the first layer's before
    GELU where that is a pass of its own. Two calls agree bit for bit.

    Differentiable once in `x`, `beside`, the weights and the biases, where needed. Keeps for the backward what GELU was
    taken of, `[..., H]`, or with `recompute` `x` alone; GELU's value is never kept. Of the weights it keeps themselves
    and no view, which would hold what ZeRO-3 has gathered.

    Args:
        x: `[..., K]`; float32, bfloat16 or float16.
        w1, b1: `[H, K]` and `[H]`, dtype of `x`; the bias may be None.
        w2, b2: `[N, H]` and `[N]`, likewise; with `beside` `[N, D + H]`.
        beside: `[..., D]` like `x`, or None: what the second layer takes besides (FLUX's attention); nothing is joined.
        recompute: computes the first layer again in the backward.
        backend: None takes the fastest that runs on `x`'s device; a name of `ops.backends` forces one.

    Returns:
        `[..., N]`, dtype of `x`.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device.
        BackendUnavailableError: `backend` can't run on `x`'s device.

    Source: Vaswani et al. 2017; GELU is Hendrycks and Gimpel 2016; `beside` is FLUX's single block.
    """
    op = "feed_forward"
    _check_tensors(op, x, w1, b1, w2, b2, beside)
    implementation = _dispatch.choose(op, OFFERED, x.device, forced=backend)
    if x.numel() == 0 and implementation == "triton":
        implementation = "torch"
    keep = not recompute and torch.is_grad_enabled()
    found: Tensor = _FeedForward.apply(x, w1, b1, w2, b2, beside, keep, implementation)
    return found


def feed_forward_reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """The specification."""
    hidden = functional.gelu(functional.linear(x, w1, b1), approximate="tanh")
    return functional.linear(hidden, w2, b2)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, beside: Tensor | None,
        keep: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        rows, other = x.reshape(-1, x.shape[-1]), None if beside is None else beside.reshape(-1, beside.shape[-1])
        wants = ctx.needs_input_grad
        keep = keep and (any(wants[:4]) or wants[5])
        hidden, h = _hidden(rows, w1, b1, backend, keep=keep)
        ctx.save_for_backward(
            rows if wants[1] or not keep else None, h, w1, b1, w2, other if wants[3] else None
        )  # fmt: skip
        ctx.backend, ctx.shape, ctx.width = backend, x.shape, 0 if other is None else other.shape[1]
        y = functional.linear(hidden, w2[:, ctx.width :], b2)
        if other is not None:
            y.addmm_(other, w2[:, : ctx.width].T)
        return y.view(*x.shape[:-1], len(w2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, h, w1, b1, w2, other = ctx.saved_tensors
        wants_x, wants_w1, wants_b1, wants_w2, wants_b2, wants_beside = ctx.needs_input_grad[:6]
        grad, width = upstream.reshape(-1, upstream.shape[-1]), ctx.width
        db2 = grad.sum(0) if wants_b2 else None
        beside = (grad @ w2[:, :width]).view(*ctx.shape[:-1], width) if wants_beside else None
        if not (wants_x or wants_w1 or wants_b1 or wants_w2):
            return None, None, None, None, db2, beside, None, None
        h = _first_layer(x, w1, b1, ctx.backend) if h is None else h
        dh, hidden = _before_gelu(grad, w2[:, width:], h, b1, ctx.backend, activation=wants_w2)
        dw2 = None if hidden is None else _second_gradient(grad, hidden, other)
        dx = (dh @ w1).view(ctx.shape) if wants_x else None
        return dx, dh.T @ x if wants_w1 else None, dh.sum(0) if wants_b1 else None, dw2, db2, beside, None, None


def _second_gradient(grad: Tensor, hidden: Tensor, beside: Tensor | None) -> Tensor:
    """Of W2."""
    whole = grad.T @ hidden
    return whole if beside is None else torch.cat([grad.T @ beside, whole], 1)


def _hidden(
    x: Tensor, w1: Tensor, b1: Tensor | None, backend: str, *, keep: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """GELU's value, and what it was taken of if `keep`."""
    if backend == "triton" and _projection_triton.takes_gelu(x.dtype):
        return _projection_triton.gelu_product(x, w1, b1, keep=keep)
    h = _first_layer(x, w1, b1, backend)
    return _gelu.forward(h, _bias(b1, backend), backend, inplace=not keep), h if keep else None


def _before_gelu(
    grad: Tensor, w2: Tensor, h: Tensor, b1: Tensor | None, backend: str, *, activation: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of what GELU was taken of, and GELU's value where `activation` asks."""
    if backend == "triton" and _projection_triton.takes_gelu(h.dtype) and not activation:
        return _projection_triton.gelu_gradient(grad, w2, h), None
    return _gelu.backward(h, _bias(b1, backend), grad @ w2, backend, inplace=True, activation=activation)


def _first_layer(x: Tensor, w1: Tensor, b1: Tensor | None, backend: str) -> Tensor:
    """What GELU is taken of, less the bias that it adds."""
    return functional.linear(x, w1, None if _gelu.fuses_bias(backend, x.dtype) else b1)


def _bias(b1: Tensor | None, backend: str) -> Tensor | None:
    """The bias that is left to GELU."""
    return b1 if b1 is not None and _gelu.fuses_bias(backend, b1.dtype) else None


def _check_tensors(
    op: str, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, beside: Tensor | None
) -> None:
    _checks.tensor(op, "x", x, _checks.MODEL_DTYPES)
    if x.ndim < 1 or x.shape[-1] == 0:
        _checks.refuse(op, "x", list(x.shape), "[..., K], K at least 1")
    width = 0
    if beside is not None:
        _checks.tensor(op, "beside", beside, (x.dtype,), device=x.device)
        if beside.shape[:-1] != x.shape[:-1]:
            _checks.refuse(op, "beside", list(beside.shape), f"{[*x.shape[:-1], 'any']}, the leading axes of x")
        width = beside.shape[-1]
    for name, weight in (("w1", w1), ("w2", w2)):
        _checks.tensor(op, name, weight, (x.dtype,), device=x.device)
        inner = x.shape[-1] if name == "w1" else len(w1) + width
        if weight.ndim != 2 or weight.shape[1] != inner or len(weight) == 0:
            _checks.refuse(op, name, list(weight.shape), f"[any, {inner}]")
    for name, bias, size in (("b1", b1, len(w1)), ("b2", b2, len(w2))):
        if bias is not None:
            _checks.tensor(op, name, bias, (x.dtype,), shape=(size,), device=x.device)
