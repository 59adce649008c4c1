"""A linear layer with a low-rank adapter beside its frozen weight.

Large products are torch's own, whose libraries are hard to beat: backends "torch" and "cpp" differ by the GELU alone,
and run `_lora_torch`, which saves passes and products around them. Backend "triton" has kernels where an adapter is
there, and in 16 bits for a product whose GELU is taken before it is stored; other plain products it leaves to torch.
That such a product is faster than cuBLAS's and a pass over its output is a count of bytes, not yet a measurement. The
specification, `lora_linear_reference`, is what tests compare with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fdfo_engine.ops import _checks, _dispatch, _gelu, _lora_torch, _lora_triton
from fdfo_engine.ops._lora_torch import Linear, Streams, Wants

OFFERED = ("triton", "cpp", "torch")
MASTER_DTYPES = (torch.float32,)
T = TypeVar("T")
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
    return _run_flat("lora_linear", x, [(weight, bias, lora_a, lora_b)], scaling, gelu, backend)[0]


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
    return _run_flat("lora_linear_group", x, linears, scaling, False, backend)


def lora_linear_streams(
    x: Tensor | Sequence[Tensor],
    linears: Sequence[Sequence[Parts]],
    scaling: float,
    *,
    tokens: Sequence[int] | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> tuple[list[tuple[Tensor, ...]], Tensor | None]:
    """`lora_linear_group` of up to two streams of tokens at once, as joint attention has them: text and image.

    On backend triton one launch takes all layers of both, reads streams that lie in one tensor where they are, and
    writes their gradients into one; the others copy.

    Args:
        x: one tensor `[B, S_i, K]` a stream; or, with `tokens`, one `[B, S, K]` that holds the streams one after the
            other. Any strides; dtypes as in `lora_linear`, which this raises the errors of.
        linears: the layers of each stream, at least one.
        scaling: of all adapters.
        tokens: S_i of each stream, at most S together; of tokens past them the gradient is 0.
        packed: joins the outputs of the streams' last layers along tokens; these have one N.
        backend: as in `lora_linear`.

    Returns:
        `[B, S_i, N]` of each stream's layers, in order, without the last ones if `packed`; and what is packed,
        `[B, sum S_i, N]`, or None.
    """
    op = "lora_linear_streams"
    xs = [x] if isinstance(x, Tensor) else list(x)
    check_streams(op, xs, linears, tokens, packed)
    out = _run(op, xs, linears, scaling, tokens=tokens, packed=packed, backend=backend)
    rest = iter(out)
    found = [tuple(itertools.islice(rest, len(layers) - packed)) for layers in linears]
    return found, next(rest) if packed else None


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    scaling: float, gelu: bool,
) -> Tensor:  # fmt: skip
    """The specification: float32 inside, one rounding of the output."""
    y = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if lora_a is not None and lora_b is not None:
        y = y + scaling * functional.linear(functional.linear(x.float(), lora_a), lora_b)
    return (functional.gelu(y, approximate="tanh") if gelu else y).to(x.dtype)


class _Plan(NamedTuple):
    """How the tensors of a call belong together."""

    counts: tuple[int, ...]
    tokens: tuple[int, ...]
    whole_x: bool
    packed: bool
    gelu: bool
    scaling: float
    backend: str

    def streams_of(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """x, or its gradient, of each stream: parts of one tensor if `whole_x`."""
        if not self.whole_x:
            return list(xs)
        return token_parts(xs[0], self.tokens)

    def by_stream(self, flat: Sequence[T]) -> list[list[T]]:
        """`flat`, of which each layer has one."""
        rest = iter(flat)
        return [list(itertools.islice(rest, count)) for count in self.counts]

    def gradients(self, upstream: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """Of each layer of each stream, `[B, S_i, N]`."""
        if not self.packed:
            return self.by_stream(upstream)
        rest = iter(upstream[:-1])
        last = [None] * len(self.counts) if upstream[-1] is None else upstream[-1].split(self.tokens, 1)
        return [[*itertools.islice(rest, count - 1), part] for count, part in zip(self.counts, last, strict=True)]


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, keep: bool, num_x: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, linears = tensors[:num_x], plan.by_stream(list(_linears(tensors[num_x:])))
        fused_gelu = plan.gelu and _lora_triton.takes_gelu(plan.backend, x[0].dtype)
        out = _implementation(plan.backend, linears, gelu=fused_gelu).forward(
            plan.streams_of(x), linears, plan.scaling, gelu=plan.gelu, keep=keep, packed=plan.packed,
            backend=plan.backend,
        )  # fmt: skip
        wants_x = any(weight or a or b for weight, _, a, b in _wants(ctx, num_x))
        kept = [*x, *out.thins] if wants_x else [None] * (num_x + len(out.thins))
        ctx.save_for_backward(*kept, *out.h, *tensors[num_x:])
        ctx.plan, ctx.num_h, ctx.x_shapes = plan, len(out.h), [t.shape for t in x]
        ctx.set_materialize_grads(False)
        return (*(y for outs in out.y for y in outs), *([] if out.packed is None else [out.packed]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        plan, num_x, saved = ctx.plan, len(ctx.x_shapes), iter(ctx.saved_tensors)
        x, thins, h = (list(itertools.islice(saved, count)) for count in (num_x, len(plan.counts), ctx.num_h))
        linears, grads = plan.by_stream(list(_linears(list(saved)))), plan.gradients(upstream)
        if h and grads[0][0] is not None:
            grads = [[_before_gelu(h[0], linears[0][0].bias, grads[0][0], plan.backend)]]
        needed = ctx.needs_input_grad[3 : 3 + num_x]
        dx = [_room(i, shape, grads, plan) if needed[i] else None for i, shape in enumerate(ctx.x_shapes)]
        none: list[Any] = [None] * len(plan.counts)
        found = _implementation(plan.backend, linears, gelu=False).backward(
            grads, none if x[0] is None else plan.streams_of(x), thins, linears, plan.scaling,
            plan.by_stream(list(_wants(ctx, num_x))), none if plan.whole_x and dx[0] is None else plan.streams_of(dx),
        )  # fmt: skip
        return None, None, None, *dx, *(gradient for four in found for gradient in four)


def _room(i: int, shape: torch.Size, grads: Sequence[Sequence[Tensor | None]], plan: _Plan) -> Tensor | None:
    """For the gradient of one tensor of x, 0 past its streams; None where no gradient comes to it."""
    some = next((g for of in (grads if plan.whole_x else [grads[i]]) for g in of if g is not None), None)
    if some is None:
        return None
    dx = some.new_empty(shape)
    if plan.whole_x:
        dx[:, sum(plan.tokens) :].zero_()
    return dx


def _before_gelu(h: Tensor, bias: Tensor | None, grad: Tensor, backend: str) -> Tensor:
    """The gradient of what GELU was taken of, less the bias where GELU adds it."""
    bias, rows = bias if _gelu.fuses_bias(backend, grad.dtype) else None, grad.flatten(0, 1).contiguous()
    return _gelu.backward(h.view(rows.shape), bias, rows, backend, inplace=False, activation=False)[0].view(grad.shape)


def _implementation(backend: str, linears: Streams, *, gelu: bool) -> Any:
    """The module that computes: Triton's kernels if there is an adapter or a GELU for them, else torch's products."""
    kernels = gelu or any(linear.rank for layers in linears for linear in layers)
    return _lora_triton if backend == "triton" and kernels else _lora_torch


def _linears(parts: Sequence[Tensor | None]) -> Iterator[Linear]:
    for four in zip(*[iter(parts)] * 4, strict=True):
        yield Linear(*four)


def _wants(ctx: Any, num_x: int) -> Iterator[Wants]:
    yield from zip(*[iter(ctx.needs_input_grad[3 + num_x :])] * 4, strict=True)


def _run_flat(
    op: str, x: Tensor, linears: Sequence[Parts], scaling: float, gelu: bool, backend: str | None
) -> tuple[Tensor, ...]:
    """One stream, of any leading axes."""
    for parts in linears:
        _check_linear(op, x, *parts)
    if x.ndim == 3:
        return _run(op, [x], [linears], scaling, gelu=gelu, backend=backend)
    out = _run(op, [x.reshape(1, -1, x.shape[-1])], [linears], scaling, gelu=gelu, backend=backend)
    return tuple(y.view(*x.shape[:-1], y.shape[2]) for y in out)


def _run(
    op: str, xs: Sequence[Tensor], linears: Sequence[Sequence[Parts]], scaling: float, *, gelu: bool = False,
    tokens: Sequence[int] | None = None, packed: bool = False, backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    scaling = _checks.number(op, "scaling", scaling)
    implementation = _dispatch.choose(op, OFFERED, xs[0].device, forced=backend)
    if implementation == "triton" and not all(x.numel() for x in xs):
        implementation = "torch"
    flat = [tensor for layers in linears for parts in layers for tensor in parts]
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (*xs, *flat))
    sizes = [x.shape[1] for x in xs] if tokens is None else tokens
    plan = _Plan(
        tuple(map(len, linears)), tuple(sizes), tokens is not None, packed, gelu, scaling, implementation
    )  # fmt: skip
    found: tuple[Tensor, ...] = _LoraLinears.apply(plan, keep, len(xs), *xs, *flat)
    return found


def token_parts(x: Tensor, tokens: Sequence[int]) -> list[Tensor]:
    """The streams that lie in x one after the other; it may hold more than them."""
    return list(x.split([*tokens, x.shape[1] - sum(tokens)], 1)[:-1])


def check_streams(
    op: str, xs: Sequence[Tensor], linears: Sequence[Sequence[Parts]], tokens: Sequence[int] | None, packed: bool
) -> None:
    """Refuses what `lora_linear_streams` does not take."""
    counts = [len(layers) for layers in linears]
    if not 1 <= len(counts) <= _checks.MAX_STREAMS or not all(counts):
        _checks.refuse(
            op, "linears", f"of lengths {counts}", f"one to {_checks.MAX_STREAMS} streams of at least one layer"
        )
    if len(xs) != (len(linears) if tokens is None else 1):
        _checks.refuse(op, "x", f"{len(xs)} tensors", f"{len(linears)}, one a stream; one alone with tokens")
    for i, x in enumerate(xs):
        _checks.tokens(op, f"x[{i}]", x)
        if len(x) != len(xs[0]) or x.shape[2] != xs[0].shape[2]:
            _checks.refuse(op, f"x[{i}]", list(x.shape), f"[{len(xs[0])}, any, {xs[0].shape[2]}], as of x[0]")
    if tokens is not None and (len(tokens) != len(linears) or min(tokens) < 1 or sum(tokens) > xs[0].shape[1]):
        _checks.refuse(op, "tokens", list(tokens), f"{len(linears)} counts, together at most {xs[0].shape[1]}")
    for layers, x in zip(linears, xs if tokens is None else [*xs] * len(linears), strict=True):
        for parts in layers:
            _check_linear(op, x, *parts)
    if packed and len({len(layers[-1][0]) for layers in linears}) > 1:
        _checks.refuse(op, "linears", [len(layers[-1][0]) for layers in linears], "last layers of one size, if packed")


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
