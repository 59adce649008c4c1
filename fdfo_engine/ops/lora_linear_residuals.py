"""Linear layers whose outputs join their residual streams inside the product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfo_engine.ops import _checks, _dispatch, _lora_triton
from fdfo_engine.ops._lora_torch import Linear
from fdfo_engine.ops.gated_residual import gated_residual
from fdfo_engine.ops.lora_linear import Parts, check_streams, lora_linear_streams, token_parts

OFFERED = ("triton", "cpp", "torch")


def lora_linear_residuals(
    x: Tensor, linears: Sequence[Parts], scaling: float, residuals: Sequence[tuple[Tensor, Tensor]], *,
    backend: str | None = None,
) -> list[Tensor]:  # fmt: skip
    """`residual + gate * lora_linear(x_i)` of up to two streams of tokens, which lie in x one after the other.

    Where one of the layers has an adapter, backend triton adds inside the product, in float32, so that the norm that
    follows reads one tensor; the backward multiplies by the gate where it reads the gradient first. Counted, not
    measured. The others, and layers without adapters, round the product and call `gated_residual`.

    Differentiable once in all tensors. Keeps for the backward what `lora_linear` keeps, and the gates; triton makes the
    product again where a gate's gradient is needed.

    Args:
        x: `[B, S, K]`, as in `lora_linear`, which this raises the errors of.
        linears: the layer of each stream.
        scaling: of all adapters.
        residuals: residual `[B, S_i, N]`, strides of B and S_i any, and gate `[B, N]` of each stream; dtype of x. The
            S_i are together at most S.
        backend: as in `lora_linear`.

    Returns:
        Like each residual, contiguous.
    """
    op, tokens = "lora_linear_residuals", [r.shape[1] if r.ndim == 3 else 0 for r, _ in residuals]
    check_streams(op, [x], [[parts] for parts in linears], tokens, False)
    scaling = _checks.number(op, "scaling", scaling)
    for i, ((residual, gate), parts) in enumerate(zip(residuals, linears, strict=True)):
        shape = (len(x), tokens[i], len(parts[0]))
        _checks.tensor(op, f"residuals[{i}]", residual, (x.dtype,), shape=shape, device=x.device)
        _checks.per_sample(op, "gate", gate, residual)
    implementation = _dispatch.choose(op, OFFERED, x.device, forced=backend)
    if implementation == "triton" and x.numel() and any(parts[2] is not None for parts in linears):
        flat = [t for stream in zip(residuals, linears, strict=True) for part in stream for t in part]
        return list(_LoraResiduals.apply(scaling, tokens, x, *flat))
    made, _ = lora_linear_streams(x, [[parts] for parts in linears], scaling, tokens=tokens, backend=backend)
    pairs = zip(made, residuals, strict=True)
    return [gated_residual(residual, y, gate, backend=backend) for (y,), (residual, gate) in pairs]


class _Stream(NamedTuple):
    """Tensors of one stream in the order of the call, or flags of them."""

    residual: Any
    gate: Any
    weight: Any
    bias: Any
    lora_a: Any
    lora_b: Any

    @classmethod
    def of(cls, flat: Sequence[Any]) -> list[_Stream]:
        return [cls(*six) for six in zip(*[iter(flat)] * 6, strict=True)]

    @property
    def linear(self) -> Linear:
        return Linear(*self[2:])


class _LoraResiduals(torch.autograd.Function):
    """On backend triton."""

    @staticmethod
    def forward(ctx: Any, scaling: float, tokens: list[int], x: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        streams = _Stream.of(flat)
        outs, thins = _lora_triton.residual_sums(
            token_parts(x, tokens), [s.linear for s in streams], scaling, [s[:2] for s in streams]
        )  # fmt: skip
        wants = _Stream.of(ctx.needs_input_grad[3:])
        wants_x = any(w.gate or w.weight or w.lora_a or w.lora_b for w in wants)
        kept = [t for s in streams for t in (None, *s[1:])]
        ctx.save_for_backward(x if wants_x else None, *(thins if wants_x else [None] * len(thins)), *kept)
        ctx.scaling, ctx.tokens, ctx.x_shape = scaling, tokens, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        some = next((g for g in upstream if g is not None), None)
        if some is None:
            return (None,) * len(ctx.needs_input_grad)
        count, tokens = len(ctx.tokens), ctx.tokens
        x, *rest = ctx.saved_tensors
        thins, streams, wants = rest[:count], _Stream.of(rest[count:]), _Stream.of(ctx.needs_input_grad[3:])
        dx = some.new_empty(ctx.x_shape) if ctx.needs_input_grad[2] else None
        if dx is not None:
            dx[:, sum(tokens) :].zero_()
        none = [None] * count
        xs = none if x is None else token_parts(x, tokens)
        found = _lora_triton.backward(
            [[g] for g in upstream], xs, thins, [[s.linear] for s in streams], ctx.scaling, [[w[2:]] for w in wants],
            none if dx is None else token_parts(dx, tokens), [[_lora_triton.Behind(gate=s.gate)] for s in streams],
        )  # fmt: skip
        gates = [
            _gate_gradient(part, s.linear, ctx.scaling, g) if want.gate and part is not None and g is not None else None
            for part, s, g, want in zip(xs, streams, upstream, wants, strict=True)
        ]
        of_streams = zip(upstream, gates, found, strict=True)
        return None, None, dx, *itertools.chain.from_iterable((g, gate, *four) for g, gate, four in of_streams)


def _gate_gradient(x: Tensor, linear: Linear, scaling: float, grad: Tensor) -> Tensor:
    """The product is made again for it: gates are trained seldom."""
    made = _lora_triton.forward([x], [[linear]], scaling, gelu=False, keep=False, packed=False, backend="triton")
    return (grad.float() * made.y[0][0].float()).sum(1).to(grad.dtype)
