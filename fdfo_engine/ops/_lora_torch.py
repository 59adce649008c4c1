"""`lora_linear` by torch's matrix products.

In float32 the adapter is added to the weight for the time of a product where that is the smaller work: `W + s B A` is
as exact there as any sum. In shorter dtypes it would round most of the adapter away, so it stays a product of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fdfo_engine.ops import _gelu


class Linear(NamedTuple):
    """Parameters of one layer: weight `[N, K]`, bias `[N]`, and float32 factors `[r, K]`, `[N, r]`, or None."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    @property
    def rank(self) -> int:
        """Rank of the adapter; 0 without one."""
        return 0 if self.lora_a is None else len(self.lora_a)


class Outputs(NamedTuple):
    """Of a forward: y `[B, S, N]` of the layers of each stream; the last layers' of all streams in one tensor, if that
    is asked for; what GELU was taken of, if kept; and the thin products `[M, ranks]` of each stream, where made.
    """

    y: list[list[Tensor]]
    packed: Tensor | None
    h: list[Tensor]
    thins: list[Tensor | None]


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Wants = tuple[bool, bool, bool, bool]
Streams = Sequence[Sequence[Linear]]
NOTHING: Gradients = (None, None, None, None)


def forward(
    xs: Sequence[Tensor], linears: Streams, scaling: float, *, gelu: bool, keep: bool, packed: bool, backend: str
) -> Outputs:
    """Every layer of each x `[B, S, K]`; `keep` says that a backward follows."""
    y, hs, thins = [], list[Tensor](), list[Tensor | None]()
    for x, layers in zip(xs, linears, strict=True):
        outs, h, thin = _stream(x.flatten(0, 1), layers, scaling, gelu=gelu, keep=keep, backend=backend)
        y.append([out.view(*x.shape[:2], out.shape[1]) for out in outs])
        hs += h
        thins.append(thin)
    joined = torch.cat([outs.pop() for outs in y], 1) if packed else None
    return Outputs(y, joined, hs, thins)


def _stream(
    rows: Tensor, layers: Sequence[Linear], scaling: float, *, gelu: bool, keep: bool, backend: str
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Outputs of each layer, what their GELU was taken of, and the thin products."""
    merged, fused = merges(rows, layers), gelu and _gelu.fuses_bias(backend, rows.dtype)
    thin = None if merged or not any(linear.rank for linear in layers) else rows @ _joined_a(layers, rows.dtype).T
    y, h = [], []
    for linear, part in zip(layers, split_ranks(thin, layers), strict=True):
        weight = merged_weight(linear, scaling) if merged else linear.weight
        out = functional.linear(rows, weight, None if fused else linear.bias)
        if part is not None and linear.lora_b is not None:
            out.addmm_(part, linear.lora_b.to(rows.dtype).T, alpha=scaling)
        if gelu:
            h += [out] if keep else []
            out = _gelu.forward(out, linear.bias if fused else None, backend, inplace=not keep)
        y.append(out)
    return y, h, thin


def backward(
    grads: Sequence[Sequence[Tensor | None]], xs: Sequence[Tensor | None], thins: Sequence[Tensor | None],
    linears: Streams, scaling: float, wants: Sequence[Sequence[Wants]], dxs: Sequence[Tensor | None],
) -> list[Gradients]:  # fmt: skip
    """Gradients of the parameters of each layer of each stream; those of x are written into `dxs` where one is given.

    `grads` `[B, S, N]` are None where an output was not used; xs are None where no parameter needs them.
    """
    found = []
    for g, x, thin, layers, want, dx in zip(grads, xs, thins, linears, wants, dxs, strict=True):
        found += _stream_backward(g, x, thin, layers, want, dx, scaling)
    return found


def _stream_backward(
    grads: Sequence[Tensor | None], x: Tensor | None, thin: Tensor | None, layers: Sequence[Linear],
    wants: Sequence[Wants], dx: Tensor | None, scaling: float,
) -> list[Gradients]:  # fmt: skip
    rows = [None if g is None else g.flatten(0, 1) for g in grads]
    x_rows = None if x is None else x.flatten(0, 1)
    parts, thin_grads = split_ranks(thin, layers), _thin_gradients(rows, layers)
    if dx is not None:
        _input_gradient(rows, thin_grads, layers, scaling, dx)
    found = []
    for g, part, thin_grad, linear, want in zip(rows, parts, thin_grads, layers, wants, strict=True):
        if g is None or not any(want):
            found.append(NOTHING)
        else:
            found.append(_parameter_gradients(g, x_rows, part, thin_grad, linear, scaling, want))
    return found


def _thin_gradients(grads: Sequence[Tensor | None], linears: Sequence[Linear]) -> list[Tensor | None]:
    """`g B` of each layer, `[M, r]`, where the gradient of x takes it; the scaling is applied later."""
    live = _live(grads, linears)
    if not live or merges(live[0][0], [linear for _, linear in live]):
        return [None] * len(grads)
    return [
        None if grad is None or linear.lora_b is None else grad @ linear.lora_b.to(grad.dtype)
        for grad, linear in zip(grads, linears, strict=True)
    ]


def _input_gradient(
    grads: Sequence[Tensor | None], thins: Sequence[Tensor | None], linears: Sequence[Linear], scaling: float,
    into: Tensor,
) -> None:  # fmt: skip
    """`sum_i g_i (W_i + s B_i A_i)`, accumulated in place; 0 where no gradient came."""
    live, thin = _live(grads, linears), [part for part in thins if part is not None]
    if not live:
        into.zero_()
        return
    dx = into.view(-1, into.shape[2]) if into.is_contiguous() else into.new_empty(len(live[0][0]), into.shape[2])
    for i, (grad, linear) in enumerate(live):
        weight = linear.weight if thin else merged_weight(linear, scaling)
        dx = dx.addmm_(grad, weight) if i else torch.mm(grad, weight, out=dx)
    if thin:
        factor = _joined_a([linear for _, linear in live], dx.dtype)
        dx.addmm_(thin[0] if len(thin) == 1 else torch.cat(thin, 1), factor, alpha=scaling)
    if not into.is_contiguous():
        into.copy_(dx.view(into.shape))


def _parameter_gradients(
    grad: Tensor,
    x: Tensor | None,
    thin: Tensor | None,
    thin_grad: Tensor | None,
    linear: Linear,
    scaling: float,
    wants: Wants,
) -> Gradients:
    """Of weight, bias and both factors, where `wants` asks; those of the factors are float32."""
    want_weight, want_bias, want_a, want_b = wants
    bias = grad.sum(0) if want_bias else None
    a, b = linear.lora_a, linear.lora_b
    if x is None:
        return None, bias, None, None
    whole = grad.T @ x if want_weight or ((want_a or want_b) and _whole_is_less(grad, linear)) else None
    da = db = None
    if a is not None and b is not None and whole is not None and grad.dtype == torch.float32:
        da = scaling * (b.T @ whole) if want_a else None
        db = scaling * (whole @ a.T) if want_b else None
    elif a is not None and b is not None:
        if want_a:
            thin_grad = grad @ b if thin_grad is None else thin_grad.float()
            da = scaling * (thin_grad.T @ x.float())
        if want_b:
            thin = x @ a.T if thin is None else thin.float()
            db = scaling * (grad.float().T @ thin)
    return whole if want_weight else None, bias, da, db


def merges(rows: Tensor, linears: Sequence[Linear]) -> bool:
    """Whether `s B A` is cheaper to add to each weight than to apply to the rows."""
    if rows.dtype != torch.float32:
        return False
    return all(not n.rank or len(rows) * sum(n.weight.shape) > n.weight.numel() for n in linears)


def merged_weight(linear: Linear, scaling: float) -> Tensor:
    """`W + s B A`, for one product."""
    if linear.lora_a is None or linear.lora_b is None:
        return linear.weight
    return torch.addmm(linear.weight, linear.lora_b, linear.lora_a, alpha=scaling)


def _joined_a(linears: Sequence[Linear], dtype: torch.dtype) -> Tensor:
    """The first factors of all layers, `[ranks, K]`: one product makes all thin ones."""
    factors = [linear.lora_a for linear in linears if linear.lora_a is not None]
    return (factors[0] if len(factors) == 1 else torch.cat(factors)).to(dtype)


def split_ranks(thin: Tensor | None, linears: Sequence[Linear]) -> list[Tensor | None]:
    """Columns of `thin` that belong to each layer."""
    if thin is None:
        return [None] * len(linears)
    parts = thin.split([linear.rank for linear in linears], dim=1)
    return [part if linear.rank else None for part, linear in zip(parts, linears, strict=True)]


def _live(grads: Sequence[Tensor | None], linears: Sequence[Linear]) -> list[tuple[Tensor, Linear]]:
    """Layers whose output was used."""
    return [(grad, linear) for grad, linear in zip(grads, linears, strict=True) if grad is not None]


def _whole_is_less(grad: Tensor, linear: Linear) -> bool:
    """Whether `G = g^T x`, of which both factors' gradients are thin products, is less work than the four it saves."""
    work = linear.weight.numel() * (len(grad) + 2 * linear.rank)
    return grad.dtype == torch.float32 and work < 2 * linear.rank * len(grad) * sum(linear.weight.shape)
