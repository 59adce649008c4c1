"""Queries, keys and values of both streams of tokens, normed and packed as they leave the projections: a rollout's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch, _lora_triton
from fdfo_engine.ops._lora_torch import Linear
from fdfo_engine.ops._qkv import MAX_HEAD_SIZE, QKV
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
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_rms_norm` of what `lora_linear_streams` makes of up to two streams of tokens. Not differentiable.

    Backend triton norms inside the product, in float32, so that raw queries and keys are neither written nor rounded;
    where some layer has an adapter and `head_size` is one of `HEAD_SIZES`. Else it is the two ops. That the norm costs
    the product less than a pass of its own is a count of bytes, not yet a measurement.

    Args:
        x: `[B, S_i, K]` of each stream; as in `lora_linear_streams`, which this raises the errors of.
        linears: the layers of q, k and v of each stream; all of one size N, a multiple of `head_size`.
        weights: of the norms of q and k of each stream, `[head_size]`, all float32 or all of x's dtype.
        scaling: of all adapters.
        head_size, eps: as in `qk_rms_norm`, which this raises the errors of.
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
    if implementation == "triton" and adapted and head_size in HEAD_SIZES and all(t.numel() for t in x):
        layers = [[Linear(*parts) for parts in of_stream] for of_stream in linears]
        flat = [w for q, k in weights for w in (q, k, q)]  # values have a place, and no norm
        packed = _lora_triton.normed_products(x, layers, scaling, _lora_triton.HeadNorm(flat, head_size, eps))
        q, k, v = (t.unflatten(2, (-1, head_size)) for t in packed)
        return q, k, v
    made, values = lora_linear_streams(x, linears, scaling, packed=True, backend=backend)
    streams = [QKV(q, k, None, *norms) for (q, k), norms in zip(made, weights, strict=True)]
    q, k, _ = qk_rms_norm(streams, head_size=head_size, eps=eps, backend=backend)
    assert values is not None
    return q, k, values.unflatten(2, (-1, head_size))


def _check_heads(
    op: str, x: Sequence[Tensor], linears: Sequence[Sequence[Parts]], weights: Sequence[tuple[Tensor, Tensor]],
    head_size: int,
) -> None:  # fmt: skip
    if isinstance(head_size, bool) or not isinstance(head_size, int) or not 1 <= head_size <= MAX_HEAD_SIZE:
        _checks.refuse(op, "head_size", repr(head_size), f"an int in 1..{MAX_HEAD_SIZE}")
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
    given = [*x, *flat, *(t for layers in linears for parts in layers for t in parts if t is not None)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        _checks.refuse(op, "gradient", "wanted", "tensors without one, or torch.no_grad()")
