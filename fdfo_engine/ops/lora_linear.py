"""A linear layer with a low-rank adapter beside its frozen weight.

Large products are torch's own, whose libraries are hard to beat: backends "torch" and "cpp" differ by the GELU alone,
and run `_lora_torch`, which saves passes and products around them. Backend "triton" has a kernel where an adapter is
there, and leaves plain products to torch. The specification, `lora_linear_reference`, is what tests compare with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fdfo_engine.ops import _checks, _dispatch, _gelu, _lora_torch, _lora_triton
from fdfo_engine.ops._lora_torch import Gradients, Linear, Wants

OFFERED = ("triton", "cpp", "torch")
MASTER_DTYPES = (torch.float32,)
NOTHING: Gradients = (None, None, None, None)
Grads = Sequence[Tensor | None]
Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    *,
    gelu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`y = x W^T + bias + scaling * (x A^T) B^T`, then tanh-GELU if `gelu`.

    Each product sums in float32; its operands have the dtype of `x`, to which A, B and `x A^T` are rounded inside.
    Backends torch and cpp round the base layer's product before the adapter's is added; the gradient of `x` is rounded
    after every layer. In float32, `W + scaling * B A` may stand for the sum. Two calls agree bit for bit.

    Differentiable once in `x`, `weight`, `bias`, `lora_a` and `lora_b`, where needed. Keeps for the backward: `x`, if a
    parameter needs it; with `gelu`, what that was taken of; `x A^T` where it was made.

    Args:
        x: `[..., K]`; float32, bfloat16 or float16.
        weight: W `[N, K]`, frozen or trained, dtype of `x`.
        bias: `[N]`, dtype of `x`, or None.
        lora_a, lora_b: A `[r, K]` and B `[N, r]`, float32, as are their gradients; or None, both.
        scaling: factor of the adapter, finite.
        gelu: applies `0.5 h (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3)))`.
        backend: None takes the fastest that runs on `x`'s device; a name of `ops.backends` forces one.

    Returns:
        `[..., N]`, dtype of `x`.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; one of `lora_a` and `lora_b` without the other.
        BackendUnavailableError: `backend` can't run on `x`'s device.
    """
    return _run("lora_linear", x, [(weight, bias, lora_a, lora_b)], scaling, gelu, backend)[0]


def lora_linear_group(
    x: Tensor, linears: Sequence[Parts], scaling: float, *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """`lora_linear` of one `x` by each `(weight, bias, lora_a, lora_b)`; N and r may differ from layer to layer.

    Cheaper than call by call: `x A^T` of all adapters is one product where it is made, and the gradient of `x` is
    summed inside the products instead of tensor by tensor.

    Args:
        x: as in `lora_linear`, which this raises the errors of.
        linears: parameters of the layers, at least one.
        scaling: of all adapters.
        backend: as in `lora_linear`.

    Returns:
        `[..., N]` of each layer, in order.
    """
    if not linears:
        _checks.refuse("lora_linear_group", "linears", "empty", "at least one (weight, bias, lora_a, lora_b)")
    return _run("lora_linear_group", x, linears, scaling, False, backend)


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    scaling: float, gelu: bool,
) -> Tensor:  # fmt: skip
    """The specification: float32 inside, one rounding of the output."""
    y = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if lora_a is not None and lora_b is not None:
        y = y + scaling * functional.linear(functional.linear(x.float(), lora_a), lora_b)
    return (functional.gelu(y, approximate="tanh") if gelu else y).to(x.dtype)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scaling: float, gelu: bool, keep: bool, backend: str, *parts: Tensor | None
    ) -> tuple[Tensor, ...]:
        linears, rows = list(_linears(parts)), x.reshape(-1, x.shape[-1])
        out = _implementation(backend).forward(rows, linears, scaling, gelu=gelu, keep=keep, backend=backend)
        wants_x = any(weight or a or b for weight, _, a, b in _wants(ctx))
        ctx.save_for_backward(rows if wants_x else None, out.thin if wants_x else None, *out.h, *parts)
        ctx.num_h, ctx.settings, ctx.shape = len(out.h), (scaling, gelu, backend), x.shape
        ctx.set_materialize_grads(False)
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in out.y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        x, thin, *rest = ctx.saved_tensors
        linears, (scaling, _, backend) = list(_linears(rest[ctx.num_h :])), ctx.settings
        grads = [None if g is None else g.reshape(-1, g.shape[-1]).contiguous() for g in upstream]
        if ctx.num_h and grads[0] is not None:
            bias = linears[0].bias if _gelu.fuses_bias(backend, grads[0].dtype) else None
            grads = [_gelu.backward(rest[0], bias, grads[0], backend, inplace=False, activation=False)[0]]
        run, found = _implementation(backend), list[Tensor | None]()
        thin_grads = run.thin_gradients(grads, linears, scaling)
        dx = run.input_gradient(grads, thin_grads, linears, scaling) if ctx.needs_input_grad[0] else None
        thins = _lora_torch.split_ranks(thin, linears)
        for g, t, tg, linear, wants in zip(grads, thins, thin_grads, linears, _wants(ctx), strict=True):
            found += NOTHING if g is None else run.parameter_gradients(g, x, t, tg, linear, scaling, wants)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, *found


def _implementation(backend: str) -> Any:
    """The module that computes: torch's products, or Triton's."""
    return _lora_triton if backend == "triton" else _lora_torch


def _linears(parts: Sequence[Tensor | None]) -> Iterator[Linear]:
    for four in zip(*[iter(parts)] * 4, strict=True):
        yield Linear(*four)


def _wants(ctx: Any) -> Iterator[Wants]:
    yield from zip(*[iter(ctx.needs_input_grad[5:])] * 4, strict=True)


def _run(
    op: str, x: Tensor, linears: Sequence[Parts], scaling: float, gelu: bool, backend: str | None
) -> tuple[Tensor, ...]:
    for parts in linears:
        _check_linear(op, x, *parts)
    scaling = _checks.number(op, "scaling", scaling)
    implementation = _dispatch.choose(op, OFFERED, x.device, forced=backend)
    if x.numel() == 0 and implementation == "triton":
        implementation = "torch"
    flat = [tensor for parts in linears for tensor in parts]
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *flat))
    found: tuple[Tensor, ...] = _LoraLinears.apply(x, scaling, gelu, keep, implementation, *flat)
    return found


def _check_linear(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None
) -> None:
    _checks.tensor(op, "x", x, _checks.MODEL_DTYPES)
    if x.ndim < 1 or x.shape[-1] == 0:
        _checks.refuse(op, "x", list(x.shape), "[..., K], K at least 1")
    _checks.tensor(op, "weight", weight, (x.dtype,), device=x.device)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or len(weight) == 0:
        _checks.refuse(op, "weight", list(weight.shape), f"[N, {x.shape[-1]}], the last axis that of x")
    if bias is not None:
        _checks.tensor(op, "bias", bias, (x.dtype,), shape=weight.shape[:1], device=x.device)
    if (lora_a is None) != (lora_b is None):
        _checks.refuse(op, "lora_a" if lora_a is None else "lora_b", None, "a tensor where the other factor is one")
    if lora_a is None or lora_b is None:
        return
    _checks.tensor(op, "lora_a", lora_a, MASTER_DTYPES, device=x.device)
    if lora_a.ndim != 2 or lora_a.shape[1] != x.shape[-1] or len(lora_a) == 0:
        _checks.refuse(op, "lora_a", list(lora_a.shape), f"[r, {x.shape[-1]}], the last axis that of x")
    _checks.tensor(op, "lora_b", lora_b, MASTER_DTYPES, shape=(len(weight), len(lora_a)), device=x.device)
