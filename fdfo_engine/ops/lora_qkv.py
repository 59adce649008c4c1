"""Queries, keys and values of both streams of tokens, normed and packed as they leave the projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfo_engine.ops import _checks, _dispatch, _lora_triton
from fdfo_engine.ops._checks import NORM_EPS
from fdfo_engine.ops._lora_torch import Linear
from fdfo_engine.ops._qkv import QKV
from fdfo_engine.ops.lora_linear import Parts, check_streams, lora_linear_streams
from fdfo_engine.ops.qk_rms_norm import qk_rms_norm

OFFERED = ("triton", "cpp", "torch")
HEAD_SIZES = (16, 32, 64)
"""Of which every block of columns of the product holds whole heads."""


def lora_qkv(
    x: Sequence[Tensor],
    linears: Sequence[Sequence[Parts]],
    weights: Sequence[tuple[Tensor, Tensor]],
    scaling: float,
    *,
    head_size: int,
    eps: float = NORM_EPS,
    invertible: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_rms_norm` of what `lora_linear_streams` makes of up to two streams of tokens.

    Backend triton norms inside the product, in float32, so that raw queries and keys are neither written nor rounded;
    where some layer has an adapter, `head_size` is one of `HEAD_SIZES` and the norms are frozen and `invertible`: their
    backward takes what they made. It goes through the norm where it reads the gradients first. Else it is the two ops.
    That the norm costs the product less than a pass of its own is a count of bytes, not yet a measurement.

    Differentiable once in all tensors. Keeps for the backward what `lora_linear_streams` keeps, and inside the product
    q, k and 1 / rms of each of their heads.

    Args:
        x: `[B, S_i, K]` of each stream; as in `lora_linear_streams`, which this raises the errors of.
        linears: the layers of q, k and v of each stream; all of one size N, a multiple of `head_size`.
        weights: of the norms of q and k of each stream, `[head_size]`, all float32 or all of x's dtype.
        scaling: of all adapters.
        head_size, eps, invertible: as in `qk_rms_norm`, which this raises the errors of.
        backend: as there.

    Returns:
        q, k and v, `[B, sum S_i, N / head_size, head_size]`, contiguous, dtype of x. Two calls agree bit for bit.
    """
    op = "lora_qkv"
    check_streams(op, list(x), linears, None, True)
    eps = _checks.not_negative(op, "eps", eps)
    scaling = _checks.number(op, "scaling", scaling)
    _check_heads(op, x, linears, weights, head_size)
    implementation = _dispatch.choose(op, OFFERED, x[0].device, forced=backend)
    adapted = any(parts[2] is not None for layers in linears for parts in layers)
    inside = adapted and head_size in HEAD_SIZES and invertible and not any(w.requires_grad for p in weights for w in p)
    if implementation == "triton" and inside and all(t.numel() for t in x):
        flat = [t for layers in linears for parts in layers for t in parts]
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*x, *flat))
        settings = _Settings(scaling, head_size, eps, keep, len(x))
        q, k, v = _LoraQkv.apply(settings, *x, *(w for pair in weights for w in pair), *flat)
        return q, k, v
    made, values = lora_linear_streams(x, linears, scaling, packed=True, backend=backend)
    streams = [QKV(q, k, None, *norms) for (q, k), norms in zip(made, weights, strict=True)]
    q, k, _ = qk_rms_norm(streams, head_size=head_size, eps=eps, invertible=invertible, backend=backend)
    assert values is not None
    return q, k, values.unflatten(2, (-1, head_size))


class _Settings(NamedTuple):
    scaling: float
    head_size: int
    eps: float
    keep: bool
    streams: int

    def split(self, flat: Sequence[Any]) -> tuple[list[Any], list[Any], list[list[Linear]]]:
        """x and weights of norms, in the order of the call, and the layers of each stream."""
        first, second = self.streams, 3 * self.streams
        layers = [Linear(*four) for four in zip(*[iter(flat[second:])] * 4, strict=True)]
        return list(flat[:first]), list(flat[first:second]), [layers[i : i + 3] for i in range(0, len(layers), 3)]


class _LoraQkv(torch.autograd.Function):
    """On backend triton; `flat`: x of each stream, weights of their norms, parts of their layers."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, *flat: Tensor | None) -> tuple[Tensor, ...]:
        x, weights, linears = settings.split(flat)
        norm = _lora_triton.HeadNorm(_of_layers(weights), settings.head_size, settings.eps)
        packed, roots, thins = _lora_triton.normed_products(x, linears, settings.scaling, norm, keep=settings.keep)
        if settings.keep:
            _, _, wants = settings.split(ctx.needs_input_grad[1:])
            wants_x = any(w.weight or w.lora_a or w.lora_b for layers in wants for w in layers)
            kept = [*x, *thins] if wants_x else [None] * (2 * len(x))
            ctx.save_for_backward(*kept, *packed[:2], *roots, *flat[len(x) :])
        ctx.settings, ctx.x_shapes = settings, [t.shape for t in x]
        ctx.set_materialize_grads(False)
        return tuple(t.unflatten(2, (-1, settings.head_size)) for t in packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        settings, count, saved = ctx.settings, ctx.settings.streams, ctx.saved_tensors
        thins, (q, k, *roots) = saved[count : 2 * count], saved[2 * count : 2 * count + 4]
        x, weights, linears = settings.split([*saved[:count], *saved[2 * count + 4 :]])
        tokens = [shape[1] for shape in ctx.x_shapes]
        dx = [
            q.new_empty(shape) if needed else None
            for shape, needed in zip(ctx.x_shapes, ctx.needs_input_grad[1:], strict=False)
        ]
        found = _lora_triton.backward(
            _by_stream([None if g is None else g.flatten(2) for g in upstream], tokens), x, thins, linears,
            settings.scaling, settings.split(ctx.needs_input_grad[1:])[2], dx, _behind(q, k, roots, weights, tokens),
        )  # fmt: skip
        return None, *dx, *[None] * len(weights), *(gradient for four in found for gradient in four)


def _of_layers(weights: Sequence[Tensor]) -> list[Tensor]:
    """One a layer: values have a place, and no norm."""
    return [w for q, k in zip(weights[::2], weights[1::2], strict=True) for w in (q, k, q)]


def _by_stream(packed: Sequence[Tensor | None], tokens: Sequence[int]) -> list[list[Tensor | None]]:
    """Of each stream its part of each tensor `[B, sum S_i, any]`."""
    parts = [[None] * len(tokens) if t is None else t.split(tokens, 1) for t in packed]
    return [list(of_stream) for of_stream in zip(*parts, strict=True)]


def _behind(
    q: Tensor, k: Tensor, roots: Sequence[Tensor], weights: Sequence[Tensor], tokens: Sequence[int]
) -> list[list[_lora_triton.Behind]]:
    """What came behind the layers of each stream: nothing behind values."""
    found = []
    streams = _by_stream([q.flatten(2), k.flatten(2), *roots], tokens)
    for (y_q, y_k, root_q, root_k), pair in zip(streams, zip(weights[::2], weights[1::2], strict=True), strict=True):
        normed = (y_q, pair[0], root_q), (y_k, pair[1], root_k)
        found.append([*(_lora_triton.Behind(normed=_lora_triton.Normed(*n)) for n in normed), _lora_triton.Behind()])  # type: ignore[arg-type]
    return found


def _check_heads(
    op: str, x: Sequence[Tensor], linears: Sequence[Sequence[Parts]], weights: Sequence[tuple[Tensor, Tensor]],
    head_size: int,
) -> None:  # fmt: skip
    _checks.head_size(op, head_size)
    sizes = [len(parts[0]) for layers in linears for parts in layers]
    if any(len(layers) != 3 for layers in linears) or len(set(sizes)) > 1 or sizes[0] % head_size:
        _checks.refuse(
            op, "linears", f"of sizes {sizes}", f"three layers a stream of one size, a multiple of {head_size}"
        )
    if len(weights) != len(linears):
        _checks.refuse(op, "weights", f"of length {len(weights)}", f"{len(linears)}, one pair a stream")
    flat = [w for pair in weights for w in pair]
    dtype = flat[0].dtype if isinstance(flat[0], Tensor) and flat[0].dtype == torch.float32 else x[0].dtype
    for i, weight in enumerate(flat):
        name = f"weights[{i // 2}][{i % 2}]"
        _checks.tensor(op, name, weight, (dtype,), shape=(head_size,), device=x[0].device)
