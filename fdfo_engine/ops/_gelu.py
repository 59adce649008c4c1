"""GELU by tanh after a matrix product: the pass over the wide tensor that projections and `feed_forward` share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfo_engine.ops import _compiled, _dispatch

BLOCK = 2048  # elements a Triton program; not tuned on a GPU yet
_aten: Any = torch.ops.aten


def fuses_bias(backend: str, dtype: torch.dtype) -> bool:
    """Whether `h` comes without its bias, which costs no pass of its own here; else the product adds it."""
    return backend == "cpp" and dtype == torch.float32


def behind_product(h: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """`gelu(h + bias)` of a product `[B, S, N]` that nobody else reads: without gradients it is written over."""
    if torch.is_grad_enabled() and (h.requires_grad or (bias is not None and bias.requires_grad)):
        found: Tensor = _Gelu.apply(h, bias, backend)
        return found
    return forward(h.flatten(0, 1), bias, backend, inplace=True).view(h.shape)


class _Gelu(torch.autograd.Function):
    """Keeps what GELU is taken of."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(h, bias)
        ctx.backend = backend
        return forward(h.flatten(0, 1), bias, backend, inplace=False).view(h.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        h, bias = ctx.saved_tensors
        needs_h, needs_bias, _ = ctx.needs_input_grad
        rows = upstream.flatten(0, 1).contiguous()
        grad, _ = backward(h.view(rows.shape), bias, rows, ctx.backend, inplace=False, activation=False)
        return grad.view(h.shape) if needs_h else None, grad.sum(0) if needs_bias else None, None


def forward(h: Tensor, bias: Tensor | None, backend: str, *, inplace: bool) -> Tensor:
    """`gelu(h + bias)` of a contiguous `[rows, size]`, written over `h` where `inplace`."""
    out, bias = h if inplace else torch.empty_like(h), None if bias is None else bias.contiguous()
    if h.numel() == 0:
        return out
    if backend == "cpp":
        arguments = _compiled.arguments("Gelu", input=_input(h, bias), out=out.data_ptr())
        _compiled.call("gelu_forward", h.device, arguments)
    elif backend in _dispatch.OF_TRITON:
        from fdfo_engine.kernels.gelu import gelu_forward_kernel  # triton: only where it runs

        with torch.cuda.device_of(h):
            gelu_forward_kernel[(-(-h.numel() // BLOCK),)](h, out, h.numel(), BLOCK=BLOCK)
    else:
        _aten.gelu.out(h, approximate="tanh", out=out)
    return out


def backward(
    h: Tensor, bias: Tensor | None, grad: Tensor, backend: str, *, inplace: bool, activation: bool
) -> tuple[Tensor, Tensor | None]:
    """`grad * gelu'(h + bias)`, written over `grad` where `inplace`, and `gelu(h + bias)` where `activation` asks."""
    out = grad if inplace else torch.empty_like(h)
    value, bias = torch.empty_like(h) if activation else None, None if bias is None else bias.contiguous()
    if h.numel() == 0:
        return out, value
    if backend == "cpp":
        arguments = _compiled.arguments(
            "GeluBackward", input=_input(h, bias), upstream=grad.data_ptr(), dh=out.data_ptr(),
            activation=_compiled.address(value),
        )  # fmt: skip
        _compiled.call("gelu_backward", h.device, arguments)
    elif backend in _dispatch.OF_TRITON:
        from fdfo_engine.kernels.gelu import gelu_backward_kernel  # triton: only where it runs

        with torch.cuda.device_of(h):
            gelu_backward_kernel[(-(-h.numel() // BLOCK),)](h, grad, out, value, h.numel(), BLOCK=BLOCK)
    else:
        value = forward(h, None, backend, inplace=False) if activation else None
        _aten.gelu_backward.grad_input(grad, h, approximate="tanh", grad_input=out)
    return out, value


def _input(h: Tensor, bias: Tensor | None) -> Any:
    rows, size = h.shape
    return _compiled.arguments(
        "GeluInput", h=h.data_ptr(), bias=_compiled.address(bias), number=_compiled.NUMBERS[h.dtype], rows=rows,
        size=size,
    )  # fmt: skip
