"""Norm of queries and keys, packing of token streams and rotary embedding in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfo_engine.ops import _compiled, _dispatch
from fdfo_engine.ops._checks import NORM_EPS
from fdfo_engine.ops._choices import chosen
from fdfo_engine.ops._qkv import QKV, Rotary, check_rotary, check_sizes, check_streams, shape_of
from fdfo_engine.ops._records import flat, restore, save, saved

__all__ = ["OFFERED", "QKV", "is_invertible", "qk_rms_norm"]

OFFERED = ("triton", "cpp", "torch")
TILE = 2048  # elements a Triton program; not tuned on a GPU yet
SPREAD, ROTARY_SPREAD = 1024, 8  # of the entries of a weight that `invertible` allows


@chosen(shape_of, lambda streams, **_settings: _dispatch.candidates(OFFERED, streams[0].q.device))
def qk_rms_norm(
    streams: Sequence[QKV],
    *,
    head_size: int,
    rotary: Rotary | None = None,
    eps: float = NORM_EPS,
    invertible: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x * rsqrt(mean(x^2) + eps) * weight` of q and k by head, then the rotary embedding; streams packed by tokens.

    As diffusers' `RMSNorm` rounds: with weights in the activations' dtype the normed value and its product with the
    weight are rounded to it; with float32 weights nothing is rounded before the end. The rotary embedding is FLUX's,
    `apply_rotary_emb(x, rotary, use_real_unbind_dim=-1)`: pairs of neighbours (a, b) go to
    `(a cos - b sin, b cos + a sin)`, in float32. v is only packed. Differentiable in q, k, v and the weights;
    gradients are in float32 inside and rounded once. Sums have a fixed order: two calls agree bit for bit.

    Args:
        streams: one or two, in the order in which their tokens are packed. q, k, v `[B, S_i, H*E]` float32, bfloat16
            or float16, with any strides of batch and token: views of one joint buffer are read where they lie.
            Weights `[E]`, all of them float32 or all in the activations' dtype.
        head_size: E, in 1..256; even with `rotary`.
        rotary: cos and sin, float32 `[sum S_i, E]`, without gradient.
        eps: at least 0.
        invertible: the weights are `is_invertible`, and `rotary` are cosines and sines of angles. With frozen weights
            backend triton then keeps, for the backward, the packed q and k, which attention keeps too, and one number
            a head in the place of q and k.
        backend: None takes the fastest that runs on the tensors' device; a name of `ops.backends` forces one.

    Returns:
        q, k and v, `[B, sum S_i, H, E]`, contiguous, in the dtype of the activations. With one stream v is not copied:
        the result is a view of it, with its strides. Where the streams have no v there is none.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device; more than two streams.
        BackendUnavailableError: `backend` can't run on the tensors' device.

    Source: Zhang and Sennrich 2019 (RMSNorm); Su et al. 2021 (rotary embedding); joint attention is SD3's and FLUX's.
    """
    op = "qk_rms_norm"
    eps = check_sizes(op, streams, head_size, eps)
    check_streams(op, streams, head_size)
    if rotary is not None:
        check_rotary(op, rotary, streams, head_size)
    implementation = _dispatch.choose(op, OFFERED, streams[0].q.device, forced=backend)
    only_v = streams[0].v if len(streams) == 1 else None
    if only_v is not None:
        streams = [streams[0]._replace(v=None)]
    if implementation == "torch":
        q, k, v = qk_rms_norm_reference(streams, head_size, rotary, eps)
    else:
        cos, sin = rotary or (None, None)
        keeps_packed = implementation == "triton" and invertible and _weights_are_frozen(streams)
        settings = _Settings(head_size, eps, implementation, keeps_packed, cos, sin)
        q, k, v = _QkRmsNorm.apply(settings, *flat(streams))
    return q, k, v if only_v is None else only_v.unflatten(2, (-1, head_size))


def qk_rms_norm_reference(
    streams: Sequence[QKV], head_size: int, rotary: Rotary | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The specification."""
    q = torch.cat([_normed(s.q.unflatten(2, (-1, head_size)), s.q_weight, eps) for s in streams], 1)
    k = torch.cat([_normed(s.k.unflatten(2, (-1, head_size)), s.k_weight, eps) for s in streams], 1)
    values = [s.v.unflatten(2, (-1, head_size)) for s in streams if s.v is not None]
    dtype = streams[0].q.dtype
    q, k = (_rotated(x, rotary).to(dtype).contiguous() for x in (q, k))
    return q, k, torch.cat(values, 1).contiguous() if values else None


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(weight.dtype) * weight


def _rotated(x_BSHE: Tensor, rotary: Rotary | None) -> Tensor:
    if rotary is None:
        return x_BSHE
    cos, sin = (table[:, None] for table in rotary)
    even, odd = x_BSHE.float().unflatten(3, (-1, 2)).unbind(4)
    return x_BSHE.float() * cos + torch.stack((-odd, even), 4).flatten(3) * sin


def is_invertible(weights: Sequence[Tensor | None], *, rotary: bool) -> bool:
    """Whether normed values can be had back from their product with each of `weights`, in 16 bits too.

    Its entries must lie within a factor of `SPREAD`, or `ROTARY_SPREAD`: the embedding mixes two of them before they
    are rounded. Reads values, so it waits for a GPU; False where there are none to read: on the meta device, or split
    by ZeRO-3.
    """
    spread = ROTARY_SPREAD if rotary else SPREAD
    for weight in weights:
        if weight is None:
            continue
        if weight.is_meta or weight.numel() == 0:
            return False
        sizes = weight.detach().float().abs()
        if not (torch.isfinite(sizes).all() and sizes.min() > 0 and sizes.min() * spread >= sizes.max()):
            return False
    return True


def _norm_weights(streams: Sequence[QKV]) -> list[Tensor | None]:
    """Of q and k of each stream, one stream after the other."""
    return [weight for s in streams for weight in (s.q_weight, s.k_weight)]


def _weights_are_frozen(streams: Sequence[QKV]) -> bool:
    """Whether there is a gradient to compute, and none of a weight."""
    trained = any(w is not None and w.requires_grad for w in _norm_weights(streams))
    return torch.is_grad_enabled() and not trained


class _Settings(NamedTuple):
    head_size: int
    eps: float
    backend: str
    keeps_packed: bool
    cos: Tensor | None
    sin: Tensor | None


class _Packed(NamedTuple):
    """`[B, sum S_i, H, E]`: the outputs, or their gradients; no v where it needs no packing."""

    q: Tensor
    k: Tensor
    v: Tensor | None


class _Kept(NamedTuple):
    """What the backward reads: the streams without v, and with `roots` the packed q and k in the place of theirs.

    `roots` are 1 / rms of each packed head of q and of k, float32 `[2, B, sum S_i, H]`.
    """

    streams: list[QKV]
    packed: _Packed | None
    roots: Tensor | None


class _QkRmsNorm(torch.autograd.Function):
    """`fields`: those of a `QKV` of each stream; the outputs are those of a `_Packed`."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, *fields: Tensor | None) -> tuple[Tensor | None, ...]:
        streams = [_readable(stream) for stream in restore(QKV, fields)]
        cos, sin = _compiled.inner_contiguous(settings.cos, 0), _compiled.inner_contiguous(settings.sin, 0)
        settings = settings._replace(cos=cos, sin=sin)
        B, size, E = streams[0].q.shape[0], streams[0].q.shape[2], settings.head_size
        tokens = [s.q.shape[1] for s in streams]
        q = torch.empty(B, sum(tokens), size // E, E, dtype=streams[0].q.dtype, device=streams[0].q.device)
        packed = _Packed(q, torch.empty_like(q), None if streams[0].v is None else torch.empty_like(q))
        roots = q.new_empty((2, *q.shape[:3]), dtype=torch.float32) if settings.keeps_packed else None
        if q.numel():
            _FORWARD[settings.backend](settings, streams, packed, roots)
        if settings.keeps_packed:
            weights = [QKV(None, None, None, s.q_weight, s.k_weight) for s in streams]  # type: ignore[arg-type]
            save(ctx, _Kept(weights, packed._replace(v=None), roots))
        else:
            save(ctx, _Kept([s._replace(v=None) for s in streams], None, None))
        ctx.settings, ctx.tokens = settings, tokens
        return packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *fields: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = _Packed._make(_compiled.inner_contiguous(grad, 3) for grad in fields)
        kept: _Kept = saved(ctx)
        streams = kept.streams if kept.packed is None else _parts(kept.packed, kept.streams, ctx.tokens)
        needed = restore(QKV, ctx.needs_input_grad[1:])
        gradients = [_empty_gradients(s, upstream, needs) for s, needs in zip(streams, needed, strict=True)]
        if upstream.q.numel():
            _BACKWARD[ctx.settings.backend](ctx.settings, streams, upstream, gradients, kept.roots)
        return None, *flat(gradients)


def _readable(s: QKV) -> QKV:
    """With heads and weights contiguous: copied where they are not."""
    q, k, v = (_compiled.inner_contiguous(x, 2) for x in (s.q, s.k, s.v))
    q_weight, k_weight = (_compiled.inner_contiguous(w, 0) for w in (s.q_weight, s.k_weight))
    return QKV(q, k, v, q_weight, k_weight)  # type: ignore[arg-type]


def _parts(packed: _Packed, weights: Sequence[QKV], tokens: Sequence[int]) -> list[QKV]:
    """The streams' parts of packed q and k, beside their `weights`."""
    qs, ks = packed.q.flatten(2).split(tokens, 1), packed.k.flatten(2).split(tokens, 1)
    return [w._replace(q=q, k=k) for w, q, k in zip(weights, qs, ks, strict=True)]


def _empty_gradients(s: QKV, upstream: _Packed, needs: QKV) -> QKV:
    """Of a stream's tensors, to be filled; those of weights, if they are needed, are 0 where there are no tokens."""
    q, k = _compiled.empty_contiguous(s.q), _compiled.empty_contiguous(s.q)
    v = None if upstream.v is None else _compiled.empty_contiguous(s.q)
    q_weight = torch.zeros_like(s.q_weight) if s.q_weight is not None and needs.q_weight else None
    k_weight = torch.zeros_like(s.k_weight) if s.k_weight is not None and needs.k_weight else None
    return QKV(q, k, v, q_weight, k_weight)


def _arguments(settings: _Settings, streams: Sequence[QKV]) -> Any:
    q = streams[0].q
    weight_dtype = next((w.dtype for w in _norm_weights(streams) if w is not None), q.dtype)
    return _compiled.arguments(
        "QkRmsNorm", number=_compiled.NUMBERS[q.dtype], weight_number=_compiled.NUMBERS[weight_dtype],
        cos=_compiled.address(settings.cos), sin=_compiled.address(settings.sin), batch=q.shape[0],
        heads=q.shape[2] // settings.head_size, size=settings.head_size, eps=settings.eps,
    )  # fmt: skip


def _rows(x: Tensor, weight: Tensor | None, rotary: bool, first: int) -> Any:
    """q, k or v of a stream whose tokens are packed from `first` on."""
    return _compiled.arguments(
        "HeadRows", x=_compiled.strided(x), weight=_compiled.address(weight), rotary=rotary, tokens=x.shape[1],
        first=first,
    )  # fmt: skip


def _from_token(packed: Tensor, first: int) -> tuple[int, int, int, int]:
    """Address of a packed tensor's token `first`, and strides of batch, token and head."""
    batch, token, head, _ = packed.stride()
    return packed.data_ptr() + first * token * packed.element_size(), batch, token, head


def _forward_cpp(settings: _Settings, streams: Sequence[QKV], packed: _Packed, _roots: Tensor | None) -> None:
    parts, first, rotary = [], 0, settings.cos is not None

    def add(rows: Any, out: Tensor) -> None:
        parts.append(_compiled.arguments("HeadRowsForward", rows=rows, out=_from_token(out, first)))

    for s in streams:
        add(_rows(s.q, s.q_weight, rotary, first), packed.q)
        add(_rows(s.k, s.k_weight, rotary, first), packed.k)
        if s.v is not None and packed.v is not None:
            add(_rows(s.v, None, False, first), packed.v)
        first += s.q.shape[1]
    _compiled.call("qk_rms_norm_forward", packed.q.device, _arguments(settings, streams), parts)


def _backward_cpp(
    settings: _Settings, streams: Sequence[QKV], upstream: _Packed, gradients: Sequence[QKV], _roots: Tensor | None
) -> None:
    parts, first, rotary = [], 0, settings.cos is not None

    def add(rows: Any, grad: Tensor, dx: Tensor | None, weight_grad: Tensor | None) -> None:
        part = _compiled.arguments(
            "HeadRowsBackward", rows=rows, upstream=_from_token(grad, first), dx=_compiled.address(dx),
            weight_grad=_compiled.address(weight_grad),
        )  # fmt: skip
        parts.append(part)

    for s, to in zip(streams, gradients, strict=True):
        add(_rows(s.q, s.q_weight, rotary, first), upstream.q, to.q, to.q_weight)
        add(_rows(s.k, s.k_weight, rotary, first), upstream.k, to.k, to.k_weight)
        if upstream.v is not None:  # v itself is not read: q stands for it
            add(_rows(s.q, None, False, first), upstream.v, to.v, None)
        first += s.q.shape[1]
    _compiled.call("qk_rms_norm_backward", upstream.q.device, _arguments(settings, streams), parts)


class _Launch(NamedTuple):
    """What both Triton kernels are launched with, beside tensors."""

    programs: tuple[int, ...]
    """Of each stream, along the grid's first axis."""
    sizes: dict[str, Any]
    constants: dict[str, int]


def tile(head_size: int) -> tuple[int, int]:
    """Rows and columns of a Triton program's tile."""
    columns = 1 << (head_size - 1).bit_length()
    return max(1, TILE // columns), columns


def _launch(settings: _Settings, streams: Sequence[QKV], packed: _Packed) -> _Launch:
    B, _, H, E = packed.q.shape
    height, width = tile(E)
    tokens = tuple(s.q.shape[1] for s in streams)
    programs = tuple(-(-B * count * H // height) for count in tokens)
    x_batches, x_tokens = tuple(s.q.stride(0) for s in streams), tuple(s.q.stride(1) for s in streams)
    sizes = {"B": B, "tokens": tokens, "HEADS": H, "x_batches": x_batches, "x_tokens": x_tokens, "eps": settings.eps}
    normed = sum(1 << i for i, weight in enumerate(_norm_weights(streams)) if weight is not None)
    constants = {
        "STREAMS": len(streams), "KINDS": 2 if packed.v is None else 3, "NORMED": normed,
        "ROTARY": settings.cos is not None, "E": E, "ROWS": height, "BLOCK_E": width,
    }  # fmt: skip
    return _Launch(programs, sizes, constants)


def _evenly_strided(s: QKV) -> QKV:
    """With one pair of strides for q, k and v: copied where they lie differently."""
    there = [x for x in (s.q, s.k, s.v) if x is not None]
    if len({x.stride() for x in there}) == 1:
        return s
    return s._replace(q=s.q.contiguous(), k=s.k.contiguous(), v=None if s.v is None else s.v.contiguous())


def _heads_of(streams: Sequence[QKV]) -> tuple[Tensor, ...]:
    """q, k and v, where it is there, of one stream after the other."""
    return tuple(x for s in streams for x in (s.q, s.k, s.v) if x is not None)


def _weights_or_any(streams: Sequence[QKV]) -> tuple[Tensor, ...]:
    """Of q and k of each stream; any tensor of their dtype where there is none."""
    weights = _norm_weights(streams)
    one = next((weight for weight in weights if weight is not None), streams[0].q)
    return tuple(one if weight is None else weight for weight in weights)


def _forward_triton(settings: _Settings, streams: Sequence[QKV], packed: _Packed, roots: Tensor | None) -> None:
    from fdfo_engine.kernels.qk_rms_norm import qk_rms_norm_forward_kernel  # triton: only where it runs

    streams = [_evenly_strided(s) for s in streams]
    launch, outs = _launch(settings, streams, packed), tuple(out for out in packed if out is not None)
    cos, sin = _tables(settings, packed.q)
    with torch.cuda.device_of(packed.q):  # triton launches on the current device, not on the tensor's
        qk_rms_norm_forward_kernel[(sum(launch.programs), len(outs))](
            xs=_heads_of(streams), weights=_weights_or_any(streams), outs=outs, roots_ptr=roots, cos_ptr=cos,
            sin_ptr=sin, **launch.sizes, **launch.constants, enable_fp_fusion=False,
        )  # fmt: skip


def _backward_triton(
    settings: _Settings, streams: Sequence[QKV], upstream: _Packed, gradients: Sequence[QKV], roots: Tensor | None
) -> None:
    from fdfo_engine.kernels.qk_rms_norm import qk_rms_norm_backward_kernel  # triton: only where it runs

    streams = [_evenly_strided(s) for s in streams]
    launch, ups = _launch(settings, streams, upstream), _one_stride(upstream)
    cos, sin = _tables(settings, ups[0])
    up_batch, up_token, up_head, _ = ups[0].stride()
    all_programs = sum(launch.programs)
    needed = any(weight is not None for weight in _norm_weights(gradients))
    partial = ups[0].new_empty((2, all_programs if needed else 0, settings.head_size), dtype=torch.float32)
    with torch.cuda.device_of(ups[0]):
        qk_rms_norm_backward_kernel[(all_programs, len(ups))](
            xs=_heads_of(streams), weights=_weights_or_any(streams), roots_ptr=roots, upstreams=ups,
            dxs=_heads_of(gradients), cos_ptr=cos, sin_ptr=sin, partial_ptr=partial, up_batch=up_batch,
            up_token=up_token, up_head=up_head, WEIGHT_GRADS=needed, **launch.sizes, **launch.constants,
            enable_fp_fusion=False,
        )  # fmt: skip
    if needed:
        of_q, of_k = (sums.split(launch.programs) for sums in partial)
        for to, q_sums, k_sums in zip(gradients, of_q, of_k, strict=True):
            _add_up(q_sums, to.q_weight)
            _add_up(k_sums, to.k_weight)


def _one_stride(upstream: _Packed) -> tuple[Tensor, ...]:
    """Of q, k and v, where it is there: copied where they lie differently."""
    there = tuple(grad for grad in upstream if grad is not None)
    if len({grad.stride() for grad in there}) == 1:
        return there
    return tuple(grad.contiguous() for grad in there)


def _tables(settings: _Settings, other: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines; without rotary embedding any tensor, which is not read."""
    return (other, other) if settings.cos is None or settings.sin is None else (settings.cos, settings.sin)


def _add_up(sums: Tensor, grad: Tensor | None) -> None:
    """The sums of all programs, in order, to the gradient of a weight where it is needed."""
    if grad is not None:
        grad.copy_(sums.sum(0, dtype=torch.float64))


_FORWARD = {"cpp": _forward_cpp, "triton": _forward_triton}
_BACKWARD = {"cpp": _backward_cpp, "triton": _backward_triton}
