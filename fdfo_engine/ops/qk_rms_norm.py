"""Norm of queries and keys, packing of token streams and rotary embedding in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfo_engine.ops import _compiled, _dispatch
from fdfo_engine.ops._checks import MAX_STREAMS, NORM_EPS
from fdfo_engine.ops._qkv import QKV, Rotary, check_rotary, check_sizes, check_streams

__all__ = ["OFFERED", "QKV", "is_invertible", "qk_rms_norm"]

OFFERED = ("triton", "cpp", "torch")
TILE = 2048  # elements a Triton program; not tuned on a GPU yet
SPREAD, ROTARY_SPREAD = 1024, 8  # of the entries of a weight that `invertible` allows


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
        packed = qk_rms_norm_reference(streams, head_size, rotary, eps)
    else:
        weights = [w for s in streams for w in (s.q_weight, s.k_weight) if w is not None]
        keeps_packed = implementation == "triton" and invertible and torch.is_grad_enabled()
        keeps_packed = keeps_packed and not any(w.requires_grad for w in weights)
        settings = _Settings(head_size, eps, implementation, keeps_packed, *rotary or (None, None))
        packed = _QkRmsNorm.apply(settings, *(tensor for stream in streams for tensor in stream))
    v = packed[2] if len(packed) == 3 else None
    return packed[0], packed[1], v if only_v is None else only_v.unflatten(2, (-1, head_size))


def qk_rms_norm_reference(
    streams: Sequence[QKV], head_size: int, rotary: Rotary | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The specification."""
    q, k = ([x.unflatten(2, (-1, head_size)) for x in xs] for xs in zip(*((s.q, s.k) for s in streams), strict=True))
    values = [s.v.unflatten(2, (-1, head_size)) for s in streams if s.v is not None]
    packed = []
    for heads, weights in ((q, [s.q_weight for s in streams]), (k, [s.k_weight for s in streams])):
        x_BSHE = torch.cat([_normed(x, w, eps) for x, w in zip(heads, weights, strict=True)], 1)
        if rotary is not None:
            cos, sin = (table[:, None] for table in rotary)
            even, odd = x_BSHE.float().unflatten(3, (-1, 2)).unbind(4)
            x_BSHE = x_BSHE.float() * cos + torch.stack((-odd, even), 4).flatten(3) * sin
        packed.append(x_BSHE.to(streams[0].q.dtype).contiguous())
    return packed[0], packed[1], torch.cat(values, 1).contiguous() if values else None


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


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(weight.dtype) * weight


class _Settings(NamedTuple):
    head_size: int
    eps: float
    backend: str
    keeps_packed: bool
    cos: Tensor | None
    sin: Tensor | None


class _Rows(NamedTuple):
    """q, k or v (kind 0, 1, 2) of one stream, `[B, S_i, H*E]`; `first` of its tokens in the packed tensor."""

    x: Tensor
    weight: Tensor | None
    kind: int
    first: int


class _QkRmsNorm(torch.autograd.Function):
    """`tensors`: q, k, v, q_weight and k_weight of each stream; v is None where it needs no packing."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        tensors = tuple(_compiled.inner_contiguous(t, 2 if i % 5 < 3 else 0) for i, t in enumerate(tensors))
        tables = [_compiled.inner_contiguous(t, 0) for t in (settings.cos, settings.sin)]
        settings = settings._replace(cos=tables[0], sin=tables[1])
        rows = _rows(tensors)
        shape = rows[0].x.shape[0], _packed_tokens(rows), rows[0].x.shape[2] // settings.head_size, settings.head_size
        packed = tuple(torch.empty(shape, dtype=t.dtype, device=t.device) for t in tensors[:3] if t is not None)
        roots = packed[0].new_empty((2, *shape[:3]), dtype=torch.float32) if settings.keeps_packed else None
        if rows[0].x.shape[0] * shape[1]:
            _FORWARD[settings.backend](settings, rows, packed, roots)
        kept = packed[:2] if settings.keeps_packed else [x for i, x in enumerate(tensors) if i % 5 < 2]
        ctx.save_for_backward(roots, *(w for i, w in enumerate(tensors) if i % 5 > 2), *kept)
        ctx.settings, ctx.tokens = settings, [q.shape[1] for q in tensors[::5] if q is not None]
        return packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *packed_grads: Tensor) -> tuple[Tensor | None, ...]:
        roots, *saved = ctx.saved_tensors
        tensors = _as_given(saved, ctx.tokens, len(packed_grads), packed=ctx.settings.keeps_packed)
        rows, wanted = _rows(tensors), ctx.needs_input_grad[1:]
        packed_grads = tuple(_compiled.inner_contiguous(grad, 3) for grad in packed_grads)
        grads: list[Tensor | None] = [None] * len(tensors)
        for i, t in enumerate(tensors):
            if t is not None and i % 5 < 3:
                grads[i] = torch.empty_like(t, memory_format=torch.contiguous_format)
            elif t is not None and wanted[i]:
                grads[i] = torch.zeros_like(t)
        if packed_grads[0].numel():
            _BACKWARD[ctx.settings.backend](ctx.settings, rows, packed_grads, grads, roots)
        return None, *grads


def _as_given(
    saved: Sequence[Tensor | None], tokens: Sequence[int], kinds: int, *, packed: bool
) -> list[Tensor | None]:
    """The inputs in their order; if q and k were kept as they are `packed`, the parts of those in the inputs' place.

    v isn't kept: its gradient has the shape of q's, which stands for it.
    """
    weights, x = saved[: 2 * len(tokens)], list(saved[2 * len(tokens) :])
    if packed:
        x = [part for parts in zip(*(t.flatten(2).split(tokens, 1) for t in x if t is not None), strict=True)
             for part in parts]  # fmt: skip
    return [
        t for i in range(0, len(weights), 2) for t in (*x[i : i + 2], x[i] if kinds == 3 else None, *weights[i : i + 2])
    ]


def _rows(tensors: Sequence[Tensor | None]) -> list[_Rows]:
    rows, first = [], 0
    for i in range(0, len(tensors), 5):
        q, k, v, q_weight, k_weight = tensors[i : i + 5]
        assert q is not None
        assert k is not None
        rows += [_Rows(q, q_weight, 0, first), _Rows(k, k_weight, 1, first)]
        if v is not None:
            rows.append(_Rows(v, None, 2, first))
        first += q.shape[1]
    return rows


def _packed_tokens(rows: list[_Rows]) -> int:
    return rows[-1].first + rows[-1].x.shape[1]


def _arguments(settings: _Settings, rows: list[_Rows]) -> Any:
    x, cos, sin = rows[0].x, settings.cos, settings.sin
    weight_dtype = next((row.weight.dtype for row in rows if row.weight is not None), x.dtype)
    tables = (0, 0) if cos is None or sin is None else (cos.data_ptr(), sin.data_ptr())
    return _compiled.arguments(
        "QkRmsNorm", _compiled.NUMBERS[x.dtype], _compiled.NUMBERS[weight_dtype], *tables,
        x.shape[0], x.shape[2] // settings.head_size, settings.head_size, settings.eps,
    )  # fmt: skip


def _head_rows(settings: _Settings, row: _Rows, packed: Tensor, *grads: Tensor | None) -> Any:
    batch, token, head, _ = packed.stride()
    address = packed.data_ptr() + row.first * token * packed.element_size()
    weight = 0 if row.weight is None else row.weight.data_ptr()
    rotary = settings.cos is not None and row.kind < 2
    outputs = (0 if grad is None else grad.data_ptr() for grad in grads)
    return _compiled.arguments(
        "HeadRows", _compiled.strided(row.x), (address, batch, token, head), weight, rotary, row.x.shape[1], row.first,
        *outputs,
    )  # fmt: skip


def _forward_cpp(settings: _Settings, rows: list[_Rows], packed: Sequence[Tensor], _: Tensor | None) -> None:
    parts = [_head_rows(settings, row, packed[row.kind], None, None) for row in rows]
    _compiled.call("qk_rms_norm_forward", rows[0].x.device, _arguments(settings, rows), parts)


def _backward_cpp(
    settings: _Settings, rows: list[_Rows], packed_grads: Sequence[Tensor], grads: Sequence[Tensor | None],
    _: Tensor | None,
) -> None:  # fmt: skip
    """`grads` of the inputs, in their order, to be filled; those of weights only where they are wanted."""
    streams = (grads[i : i + 5] for i in range(0, len(grads), 5))
    outputs = [pair for dq, dk, dv, *dw in streams for pair in ((dq, dw[0]), (dk, dw[1]), (dv, None))]
    wanted = [pair for pair in outputs if pair[0] is not None]
    parts = [_head_rows(settings, row, packed_grads[row.kind], *pair) for row, pair in zip(rows, wanted, strict=True)]
    _compiled.call("qk_rms_norm_backward", rows[0].x.device, _arguments(settings, rows), parts)


class _Tiles(NamedTuple):
    """What both Triton kernels are launched with."""

    grid: tuple[int, int]
    blocks: int
    """Programs of the first stream, along the grid's first axis."""
    sizes: tuple[int, ...]
    constants: dict[str, int]


def tile(head_size: int) -> tuple[int, int]:
    """Rows and columns of a Triton program's tile."""
    columns = 1 << (head_size - 1).bit_length()
    return max(1, TILE // columns), columns


def _tiles(settings: _Settings, rows: list[_Rows], kinds: int) -> _Tiles:
    x, E = rows[0].x, settings.head_size
    tokens = [row.x.shape[1] for row in rows[::kinds]] + [0] * (MAX_STREAMS - len(rows) // kinds)
    strides = [row.x.stride()[:2] for row in (rows[0], rows[-kinds])]
    heads, (height, width) = x.shape[2] // E, tile(E)
    blocks = [-(-x.shape[0] * n * heads // height) for n in tokens]
    normed = sum(1 << (2 * (i // kinds) + row.kind) for i, row in enumerate(rows) if row.weight is not None)
    constants = {"NORMED": normed, "ROTARY": settings.cos is not None, "E": E, "ROWS": height, "BLOCK_E": width}
    return _Tiles((sum(blocks), kinds), blocks[0], (x.shape[0], *tokens, heads, *strides[0], *strides[1]), constants)


def _by_kind(tensors: Sequence[Tensor | None], kinds: int) -> list[Tensor]:
    """One tensor for q, k and v of both streams, the first one in the place of each that is not there."""
    streams = [tensors[:kinds], tensors[-kinds:]]
    return [s[i] if i < kinds and s[i] is not None else tensors[0] for s in streams for i in range(3)]  # type: ignore[misc]


def _weights(rows: list[_Rows], kinds: int) -> list[Tensor]:
    """Of q and k of both streams; any tensor of their dtype where there is none."""
    some = next((row.weight for row in rows if row.weight is not None), rows[0].x)
    both = [row.weight if row.weight is not None else some for row in rows if row.kind < 2]
    return both[:2] + both[-2:]


def _forward_triton(
    settings: _Settings, rows: list[_Rows], packed: Sequence[Tensor], roots: Tensor | None
) -> None:  # fmt: skip
    from fdfo_engine.kernels.qk_rms_norm import qk_rms_norm_forward_kernel  # triton: only where it runs

    kinds = len(packed)
    rows = _evenly_strided(rows, kinds)
    tiles = _tiles(settings, rows, kinds)
    outputs = (*packed, packed[0])[:3]
    tables = [packed[0] if table is None else table for table in (settings.cos, settings.sin)]
    with torch.cuda.device_of(packed[0]):  # triton launches on the current device, not on the tensor's
        qk_rms_norm_forward_kernel[tiles.grid](
            *_by_kind([row.x for row in rows], kinds), *_weights(rows, kinds), *outputs, roots, *tables, *tiles.sizes,
            settings.eps, **tiles.constants, enable_fp_fusion=False,
        )  # fmt: skip


def _backward_triton(
    settings: _Settings, rows: list[_Rows], packed_grads: Sequence[Tensor], grads: Sequence[Tensor | None],
    roots: Tensor | None,
) -> None:  # fmt: skip
    from fdfo_engine.kernels.qk_rms_norm import qk_rms_norm_backward_kernel  # triton: only where it runs

    kinds = len(packed_grads)
    rows = _evenly_strided(rows, kinds)
    tiles, dx = _tiles(settings, rows, kinds), [g for i, g in enumerate(grads) if i % 5 < kinds]
    if len({grad.stride() for grad in packed_grads}) > 1:
        packed_grads = [grad.contiguous() for grad in packed_grads]
    upstream = (*packed_grads, packed_grads[0])[:3]
    like, wanted = upstream[0], [g for i, g in enumerate(grads) if i % 5 > 2]
    tables = [like if table is None else table for table in (settings.cos, settings.sin)]
    needed = any(grad is not None for grad in wanted)
    partial = like.new_empty((2, tiles.grid[0] if needed else 0, settings.head_size), dtype=torch.float32)
    x = _by_kind([row.x for row in rows], kinds)
    with torch.cuda.device_of(like):
        qk_rms_norm_backward_kernel[tiles.grid](
            *x[:2], *x[3:5], *_weights(rows, kinds), roots, *upstream, *_by_kind(dx, kinds), *tables, partial,
            *tiles.sizes, *like.stride()[:3], settings.eps, **tiles.constants, WEIGHT_GRADS=needed,
            enable_fp_fusion=False,
        )  # fmt: skip
    for i, grad in enumerate(wanted):
        if grad is not None:
            of_stream = slice(tiles.blocks) if i < 2 else slice(tiles.blocks, None)
            grad.copy_(partial[i % 2, of_stream].sum(0, dtype=torch.float64))


def _evenly_strided(rows: list[_Rows], kinds: int) -> list[_Rows]:
    """With one pair of strides for q, k and v of a stream: copied where they lie differently."""
    out = []
    for i in range(0, len(rows), kinds):
        stream = rows[i : i + kinds]
        even = len({row.x.stride() for row in stream}) == 1
        out += stream if even else [row._replace(x=row.x.contiguous()) for row in stream]
    return out


_FORWARD = {"cpp": _forward_cpp, "triton": _forward_triton}
_BACKWARD = {"cpp": _backward_cpp, "triton": _backward_triton}
