"""Linear layers of one or two streams of tokens, with a low-rank adapter beside frozen weights and what follows them.

A backend computes products, and perhaps their ends inside them. Large products of layers without an adapter are torch's
own, whose libraries are hard to beat; so are all of backends "torch" and "cpp", which differ by the passes behind them.
Backend "triton" has kernels where an adapter is there, and in 16 bits for a product whose GELU is taken before it is
stored. That such a product is faster than cuBLAS's and a pass over its output is a count of bytes, not yet a
measurement. The specification, `adapted_projection_reference`, is what tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fdfo_engine.ops import _checks, _dispatch, _projection_torch, _projection_triton
from fdfo_engine.ops._choices import Shape, chosen
from fdfo_engine.ops._description import Arguments, Description, Kept, Outputs
from fdfo_engine.ops._projection_checks import check_description, check_projection, check_streams
from fdfo_engine.ops._projection_ends import finish, with_ends
from fdfo_engine.ops._records import blank, flat, restore_like, save, saved
from fdfo_engine.ops.projection import (
    Adapter,
    End,
    Gelu,
    HeadNorm,
    IntoResidual,
    Operands,
    Packed,
    Projected,
    Projection,
)

OFFERED = ("triton", _dispatch.LIBRARY, "cpp", "torch")


def _shape(
    x: Tensor | Sequence[Tensor], projections: Sequence[Sequence[Projection]], *, tokens: Sequence[int] | None = None
) -> Shape:
    """Of each stream its tokens; the width of x; of each projection its own width, rank and end."""
    inputs = [x] if isinstance(x, Tensor) else x
    counts = tuple(t.shape[1] for t in inputs) if tokens is None else tuple(tokens)
    outlines = tuple(_outline(projection) for of_stream in projections for projection in of_stream)
    return counts, inputs[0].shape[-1], outlines, inputs[0].dtype


def _shape_of_one(x: Tensor, projection: Projection) -> Shape:
    return x.shape[-2] if x.ndim > 2 else 1, x.shape[-1], _outline(projection), x.dtype


def _outline(projection: Projection) -> str:
    """Of a projection its width, rank and end."""
    end = "" if projection.end is None else type(projection.end).__name__
    return f"{projection.width}r{projection.rank}{end}"


def _candidates(x: Tensor | Sequence[Tensor], *_rest: Any, **_settings: Any) -> list[str]:
    return _dispatch.candidates(OFFERED, (x if isinstance(x, Tensor) else x[0]).device)


@chosen(_shape, _candidates)
def adapted_projections(
    x: Tensor | Sequence[Tensor],
    projections: Sequence[Sequence[Projection]],
    *,
    tokens: Sequence[int] | None = None,
    backend: str | None = None,
) -> Projected:
    """The projections of one or two streams of tokens, as joint attention has them: text and image.

    `y = x W^T + bias + scale * (x A^T) B^T` of each, then its end. Each product sums in float32; its operands have the
    dtype of x, to which A, B and `x A^T` are rounded inside. The base layer's product may be rounded before the
    adapter's is added, and y before its end: backend triton rounds neither where it takes the end inside the product
    (`ends_inside` says where). The gradient of x may be rounded after every layer. In float32, `W + scale * B A` may
    stand for the sum. Two calls agree bit for bit.

    Cheaper than call by call: `x A^T` of all adapters of a stream is one product where it is made, and the gradient of
    x is summed inside the products. On backend triton one launch takes all projections of both streams, reads streams
    that lie in one tensor where they are, and writes their gradients into one; the others copy.

    Differentiable once in all tensors but the tables of `rotary`, where needed. Keeps for the backward: x, where a
    parameter needs it; `x A^T` where it was made; what GELU was taken of; gates; of a norm q and k, packed or not.

    Args:
        x: one tensor `[B, S_i, K]` a stream; or, with `tokens`, one `[B, S, K]` that holds the streams one after the
            other. Any strides; float32, bfloat16 or float16.
        projections: of each stream, at least one. Weights and biases have the dtype of x, frozen or trained. `Packed`
            ones have counterparts of their size in the other stream; `HeadNorm` is for the first two of three.
        tokens: S_i of each stream, at most S together; of tokens past them the gradient is 0.
        backend: None takes the fastest that runs on x's device; a name of `ops.backends` forces one.

    Returns:
        `Projected`: outputs in the dtype of x, by their end. A residual may hold its product unsummed, for the next
        norm.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; ends that do not fit each other.
        BackendUnavailableError: `backend` can't run on x's device.

    Source: Hu et al. 2021 (LoRA).
    """
    op, inputs = "adapted_projections", [x] if isinstance(x, Tensor) else list(x)
    check_streams(op, inputs, projections, tokens)
    counts = [t.shape[1] for t in inputs] if tokens is None else list(tokens)
    description = Description(inputs, counts, shared=tokens is not None, projections=projections)
    check_description(op, description)
    return _run(op, description, backend)


@chosen(_shape_of_one, _candidates)
def adapted_projection(x: Tensor, projection: Projection, *, backend: str | None = None) -> Tensor:
    """`adapted_projections` of one x `[..., K]` by one projection, which may end with `Gelu`; returns `[..., N]`.

    Args:
        x, projection, backend: as there.

    Returns:
        `[..., N]`, dtype of x.

    Raises:
        ValueError: as there; another end.
        BackendUnavailableError: as there.
    """
    op = "adapted_projection"
    check_projection(op, "", x, projection)
    if not (projection.end is None or isinstance(projection.end, Gelu)):
        _checks.refuse(op, "end", type(projection.end).__name__, "None or Gelu; adapted_projections takes the others")
    rows = x if x.ndim == 3 else x.reshape(-1, 1, x.shape[-1])  # samples: see `_projection_triton.gelu_product`
    description = Description([rows], [rows.shape[1]], shared=False, projections=[[projection]])
    ((y,),) = _run(op, description, backend).streams
    return y if x.ndim == 3 else y.view(*x.shape[:-1], y.shape[2])


def adapted_projection_reference(x: Tensor, projection: Projection) -> Tensor:
    """The specification of one projection: float32 inside, one rounding of the output."""
    bias, adapter, end = projection.bias, projection.adapter, projection.end
    y = functional.linear(x.float(), projection.weight.float(), None if bias is None else bias.float())
    if adapter is not None:
        y = y + adapter.scale * functional.linear(functional.linear(x.float(), adapter.a), adapter.b)
    return (y if end is None else end.reference(y)).to(x.dtype)


class Route(NamedTuple):
    """Who computes the products of a call, and what of the call: all of it, or without some of its ends."""

    products: ModuleType
    description: Description


_PRODUCTS = {
    "triton": (_projection_triton, _projection_torch), _dispatch.LIBRARY: (_projection_torch,),
    "cpp": (_projection_torch,), "torch": (_projection_torch,),
}  # fmt: skip
_INSIDE: tuple[tuple[type, ...], ...] = ((Gelu, IntoResidual, HeadNorm, Packed), (Packed,), ())
"""Kinds of ends that may be taken inside a product, most first; the others follow behind it."""


def route(description: Description, backend: str) -> Route:
    """The first products, with the most ends inside them, that support the call: chosen here and nowhere else.

    What measurements say against an end inside a product, for some shape, belongs here.
    """
    for products in _PRODUCTS[backend]:
        for kinds in _INSIDE:
            candidate = with_ends(description, kinds, backend)
            if not products.supports(candidate):
                return Route(products, candidate)
    raise AssertionError("torch's products take every call without ends")


def ends_inside(name: str) -> dict[str, list[str]]:
    """Reasons why the backend of this name takes an end behind its product, by the end's; empty where inside.

    Asked of bfloat16 projections of one token with an adapter, and of heads of 64 with frozen, invertible norms.
    """
    x, gate = torch.zeros(1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 64, dtype=torch.bfloat16)
    weight, adapter = x.new_zeros(64, 64), Adapter(torch.zeros(1, 64), torch.zeros(64, 1))
    norm = HeadNorm(gate[0], 64, invertible=True)
    examples: list[list[End]] = [[Gelu()], [IntoResidual(x, gate)], [norm, norm, Packed()]]
    found = {}
    for ends in examples:
        projections = [Projection(weight, adapter=adapter, end=end) for end in ends]
        description = Description([x], [1], shared=False, projections=[projections])
        found[type(ends[0]).__name__] = _PRODUCTS[name][0].supports(description)
    return found


def _run(op: str, description: Description, backend: str | None) -> Projected:
    implementation = _dispatch.choose(op, OFFERED, description.inputs[0].device, forced=backend)
    products, computed = route(description, implementation)
    behind = "triton" if implementation == _dispatch.LIBRARY else implementation
    return finish(description, computed, _outputs(products, computed), behind)


def _outputs(products: Any, description: Description) -> Outputs:
    given = description.arguments()
    arguments = flat(given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments):
        return restore_like(description.outline(), _AdaptedProjections.apply(products, description, given, *arguments))
    made: Outputs = products.forward(description, keep=False).outputs
    return made


class _AdaptedProjections(torch.autograd.Function):
    """`given` are the tensors of `description`, and `arguments` the same for autograd to see."""

    @staticmethod
    def forward(
        ctx: Any, products: Any, description: Description, given: Arguments, *arguments: Tensor | None
    ) -> tuple[Tensor, ...]:
        made = products.forward(description, keep=True)
        _, _, _, *flags = ctx.needs_input_grad
        needed = restore_like(given, flags)
        read = [[operands._replace(residual=None) for operands in of_stream] for of_stream in given.operands]
        inputs, rank_products = given.inputs, made.rank_products
        if not any(_reads_input(operands) for of_stream in needed.operands for operands in of_stream):
            inputs, rank_products = blank(inputs), blank(rank_products)
        save(ctx, Kept(Arguments(inputs, read), rank_products, made.beside, _normed(made.outputs, made.beside)))
        ctx.products, ctx.needed, ctx.shapes = products, needed, [x.shape for x in description.inputs]
        ctx.description = description.with_arguments(needed)  # any without tensors; the backward has its own
        ctx.set_materialize_grads(False)
        return flat(made.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        kept, needed = saved(ctx), ctx.needed
        description: Description = ctx.description.with_arguments(kept.arguments)
        grads = description.by_projection(restore_like(description.outline(), upstream))
        given = grads if not description.shared else [[grad for of_stream in grads for grad in of_stream]]
        inputs = [
            _input_memory(shape, of_input, description) if flag else None
            for shape, of_input, flag in zip(ctx.shapes, given, needed.inputs, strict=True)
        ]
        operands = ctx.products.backward(description, kept, grads, needed.operands, description.by_stream(inputs))
        return None, None, None, *flat(Arguments(inputs, operands))


def _normed(outputs: Outputs, beside: Outputs) -> Outputs:
    """The packed outputs that went through a norm, which left 1 / rms: its backward reads them."""
    packed = [None if rstd is None else y for y, rstd in zip(outputs.packed, beside.packed, strict=True)]
    return blank(outputs)._replace(packed=packed)


def _reads_input(needed: Operands) -> bool:
    """Whether a gradient of these takes x."""
    return bool(needed.weight or needed.lora_a or needed.lora_b or needed.gate)


def _input_memory(shape: torch.Size, grads: Sequence[Tensor | None], description: Description) -> Tensor | None:
    """For the gradient of an x to whose outputs these `grads` come; 0 past its streams. None without any."""
    present = [grad for grad in grads if grad is not None]
    if not present:
        return None
    memory = present[0].new_empty(shape)
    if description.shared:
        memory[:, sum(description.tokens) :].zero_()
    return memory
