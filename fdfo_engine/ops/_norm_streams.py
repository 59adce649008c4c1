"""Norms of tokens with a modulation, after a gated residual or without: what `layer_norm_modulate` and
`gated_residual_norm` run on a fast backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfo_engine.ops import _compiled
from fdfo_engine.ops._records import by_field, flat, restore, save, saved

TOKENS = 32  # tokens of a partial sum of a Triton program; not tuned on a GPU yet


class NormStream(NamedTuple):
    """Tokens of one kind with their modulation, and a second one or not; with y and gate or neither, as in
    `gated_residual_norm`.
    """

    x: Tensor
    scale: Tensor
    shift: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None
    scale2: Tensor | None = None
    shift2: Tensor | None = None

    @property
    def modulations(self) -> list[tuple[Tensor, Tensor]]:
        """Scale and shift of each norm."""
        first = self.scale, self.shift
        return [first] if self.scale2 is None or self.shift2 is None else [first, (self.scale2, self.shift2)]


class _Outputs(NamedTuple):
    """Of one stream. `x_new` is x itself without a gate; `normed2` is there with a second modulation."""

    x_new: Tensor
    normed: Tensor
    normed2: Tensor | None


class _Kept(NamedTuple):
    """What the backward of a stream reads. `normed_from` is what was normalised; y is kept where the gate trains."""

    normed_from: Tensor
    statistics: Tensor
    scale: Tensor
    scale2: Tensor | None
    gate: Tensor | None
    y: Tensor | None


class _OfInputs(NamedTuple):
    """A flag, or a gradient, for each field of a `NormStream`."""

    x: Any = None
    scale: Any = None
    shift: Any = None
    y: Any = None
    gate: Any = None
    scale2: Any = None
    shift2: Any = None


class _Backward(NamedTuple):
    """What a backward kernel reads and writes of one stream. Upstream gradients are those of `_Outputs`."""

    kept: _Kept
    upstream: Tensor
    upstream2: Tensor | None
    upstream_x: Tensor | None
    dx: Tensor
    dy: Tensor | None
    sum_modulations: bool

    @property
    def sum_gate(self) -> bool:
        """The gradient of the gate is needed."""
        return self.kept.y is not None

    @property
    def kinds(self) -> int:
        """Gradients that are sums over tokens: of scale, shift, scale2, shift2 and gate, in this order."""
        modulations = 2 if self.upstream2 is None else 4
        return modulations * self.sum_modulations + self.sum_gate


def modulated_norms(streams: Sequence[NormStream], eps: float, backend: str) -> list[tuple[Tensor, ...]]:
    """x_new, which is x without a gate, and one or two norms of each stream.

    The gradient of that x_new is added inside the norm's backward, like that of a sum.
    """
    fields = flat(streams)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in fields):
        outputs = restore(_Outputs, _ModulatedNorms.apply(eps, backend, *fields))
    else:
        outputs = _forward(_readable(streams), [None] * len(streams), eps, backend)
    return [tuple(t for t in out if t is not None) for out in outputs]


class _ModulatedNorms(torch.autograd.Function):
    """`fields`: those of a `NormStream` of each stream; the outputs are those of its `_Outputs`."""

    @staticmethod
    def forward(ctx: Any, eps: float, backend: str, *fields: Tensor | None) -> tuple[Tensor | None, ...]:
        streams = _readable(restore(NormStream, fields))
        statistics = [torch.empty(*s.x.shape[:2], 2, dtype=torch.float32, device=s.x.device) for s in streams]
        outputs = _forward(streams, statistics, eps, backend)
        needed = restore(_OfInputs, ctx.needs_input_grad[2:])
        kept = []
        for s, of_stream, out, needs in zip(streams, statistics, outputs, needed, strict=True):
            kept.append(_Kept(out.x_new, of_stream, s.scale, s.scale2, s.gate, s.y if needs.gate else None))
        save(ctx, tuple(kept))
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        return flat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *fields: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, needed = restore(_Outputs, fields), restore(_OfInputs, ctx.needs_input_grad[2:])
        gradients = [_OfInputs() for _ in needed]
        work: dict[int, _Backward] = {}
        for i, (kept, of_outputs, needs) in enumerate(zip(saved(ctx), upstream, needed, strict=True)):
            if any(gradient is not None for gradient in of_outputs):
                work[i] = _backward_of(kept, of_outputs, needs)
        for i, sums in zip(work, _sums(list(work.values()), ctx.backend), strict=True):
            gradients[i] = _gradients(work[i], sums)
        return None, None, *flat(gradients)


def _readable(streams: Sequence[NormStream]) -> list[NormStream]:
    """With the last axis of each tensor contiguous: copied where it is not."""
    return [NormStream._make(map(_compiled.last_contiguous, stream)) for stream in streams]


def _backward_of(kept: _Kept, upstream: _Outputs, needs: _OfInputs) -> _Backward:
    """Of a stream some of whose outputs have an `upstream` gradient."""
    like = kept.normed_from
    first = _compiled.last_contiguous(torch.zeros_like(like) if upstream.normed is None else upstream.normed)
    second = upstream.normed2
    if kept.scale2 is not None:
        second = _compiled.last_contiguous(torch.zeros_like(like) if second is None else second)
    return _Backward(
        kept=kept,
        upstream=first,
        upstream2=second,
        upstream_x=_compiled.last_contiguous(upstream.x_new),
        dx=_compiled.empty_contiguous(first),
        dy=None if kept.gate is None else _compiled.empty_contiguous(first),
        sum_modulations=needs.scale or needs.shift or needs.scale2 or needs.shift2,
    )


def _sums(work: Sequence[_Backward], backend: str) -> list[Tensor]:
    """Runs the backward of each stream; returns its sums over tokens, `[kinds, B, D]`."""
    full = [w for w in work if w.dx.numel()]
    found = iter(_BACKWARD[backend](full) if full else [])
    return [next(found) if w.dx.numel() else _empty_sums(w).zero_() for w in work]


def _empty_sums(w: _Backward) -> Tensor:
    return torch.empty(w.kinds, *w.kept.scale.shape, dtype=w.dx.dtype, device=w.dx.device)


def _gradients(w: _Backward, sums: Tensor) -> _OfInputs:
    """Of the inputs, whose `sums` come in the order of `_Backward.kinds`."""
    rest = iter(sums.unbind())
    found = _OfInputs(x=w.dx, y=w.dy)
    if w.sum_modulations:
        found = found._replace(scale=next(rest), shift=next(rest))
    if w.sum_modulations and w.upstream2 is not None:
        found = found._replace(scale2=next(rest), shift2=next(rest))
    return found._replace(gate=next(rest)) if w.sum_gate else found


def _forward(
    streams: Sequence[NormStream], statistics: Sequence[Tensor | None], eps: float, backend: str
) -> list[_Outputs]:
    """The outputs of each stream; its `statistics`, `[B, S, 2]`, are written too if they are there."""
    empty = _compiled.empty_contiguous
    outputs = []
    for s in streams:
        x_new = s.x if s.gate is None else empty(s.x)
        outputs.append(_Outputs(x_new, empty(s.x), None if s.scale2 is None else empty(s.x)))
    full = [work for work in zip(streams, statistics, outputs, strict=True) if work[0].x.numel()]
    if full:
        _FORWARD[backend](full, eps)
    return outputs


_Forward = tuple[NormStream, Tensor | None, _Outputs]


def _forward_cpp(work: Sequence[_Forward], eps: float) -> None:
    address, row = _compiled.address, _compiled.row_strided
    for s, statistics, out in work:
        arguments = _compiled.arguments(
            "LayerNormModulate", x=_compiled.strided(s.x), y=_compiled.strided(s.y), gate=row(s.gate),
            scale=row(s.scale), shift=row(s.shift), scale2=row(s.scale2), shift2=row(s.shift2), eps=eps,
            x_new=0 if s.gate is None else address(out.x_new), out=address(out.normed), out2=address(out.normed2),
            statistics=address(statistics), shape=s.x.shape, number=_compiled.NUMBERS[s.x.dtype],
        )  # fmt: skip
        _compiled.call("layer_norm_modulate_forward", s.x.device, arguments)


def _backward_cpp(work: Sequence[_Backward]) -> list[Tensor]:
    address, row, strided = _compiled.address, _compiled.row_strided, _compiled.strided
    found = []
    for w in work:
        kept, sums = w.kept, _empty_sums(w)
        arguments = _compiled.arguments(
            "LayerNormModulateBackward", normed_from=strided(kept.normed_from), statistics=address(kept.statistics),
            y=strided(kept.y), gate=row(kept.gate), scale=row(kept.scale), scale2=row(kept.scale2),
            upstream=strided(w.upstream), upstream2=strided(w.upstream2), upstream_x=strided(w.upstream_x),
            dx=address(w.dx), dy=address(w.dy), d_modulation=address(sums) if w.sum_modulations else 0,
            d_gate=address(sums[-1]) if w.sum_gate else 0, shape=w.dx.shape, number=_compiled.NUMBERS[w.dx.dtype],
        )  # fmt: skip
        _compiled.call("layer_norm_modulate_backward", w.dx.device, arguments)
        found.append(sums)
    return found


def _forward_triton(work: Sequence[_Forward], eps: float) -> None:
    from fdfo_engine.kernels.layer_norm_modulate import layer_norm_modulate_forward_kernel  # triton: only where it runs

    streams, statistics, outputs = zip(*work, strict=True)
    of, out, x = by_field(streams), by_field(outputs), streams[0].x
    x_news = tuple(None if s.gate is None else o.x_new for s, _, o in work)
    block, warps = tile(x.shape[2])
    tokens = tuple(s.x.shape[1] for s in streams)
    with torch.cuda.device_of(x):  # triton launches on the current device, not on the tensor's
        layer_norm_modulate_forward_kernel[(len(x) * sum(tokens),)](
            xs=of.x, ys=of.y, gates=of.gate, scales=of.scale, shifts=of.shift, scale2s=of.scale2, shift2s=of.shift2,
            statistics=statistics, x_news=x_news, outs=out.normed, out2s=out.normed2, B=len(x), Ss=tokens, D=x.shape[2],
            x_samples=_strides(of.x, 0), x_tokens=_strides(of.x, 1), y_samples=_strides(of.y, 0),
            y_tokens=_strides(of.y, 1), gate_rows=_strides(of.gate, 0), scale_rows=_strides(of.scale, 0),
            shift_rows=_strides(of.shift, 0), scale2_rows=_strides(of.scale2, 0), shift2_rows=_strides(of.shift2, 0),
            eps=eps, STREAMS=len(streams), BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _backward_triton(work: Sequence[_Backward]) -> list[Tensor]:
    if len({w.sum_modulations for w in work}) > 1:
        return [sums for w in work for sums in _backward_triton([w])]
    from fdfo_engine.kernels.layer_norm_modulate import layer_norm_modulate_backward_kernel

    of, kept = by_field(work), by_field([w.kept for w in work])
    B, _, D = work[0].dx.shape
    tokens = TOKENS if any(w.kinds for w in work) else 1
    programs = [B * -(-w.dx.shape[1] // tokens) for w in work]
    partials = tuple(map(_partial_sums, work, programs))
    block, warps = tile(D)
    with torch.cuda.device_of(work[0].dx):
        layer_norm_modulate_backward_kernel[(sum(programs),)](
            xs=kept.normed_from, ys=kept.y, gates=kept.gate, scales=kept.scale, scale2s=kept.scale2,
            statistics=kept.statistics, upstreams=of.upstream, upstream2s=of.upstream2, upstream_xs=of.upstream_x,
            dxs=of.dx, dys=of.dy, partials=partials, kinds=tuple(w.kinds for w in work), B=B,
            Ss=tuple(w.dx.shape[1] for w in work), D=D,
            x_samples=_strides(kept.normed_from, 0), x_tokens=_strides(kept.normed_from, 1),
            y_samples=_strides(kept.y, 0), y_tokens=_strides(kept.y, 1), gate_rows=_strides(kept.gate, 0),
            scale_rows=_strides(kept.scale, 0), scale2_rows=_strides(kept.scale2, 0),
            up_samples=_strides(of.upstream, 0), up_tokens=_strides(of.upstream, 1),
            up2_samples=_strides(of.upstream2, 0), up2_tokens=_strides(of.upstream2, 1),
            up_x_samples=_strides(of.upstream_x, 0), up_x_tokens=_strides(of.upstream_x, 1), STREAMS=len(work),
            SUM_MODULATIONS=work[0].sum_modulations, TOKENS=tokens, BLOCK=block, num_warps=2 * warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    dtype = work[0].dx.dtype
    return [partial.unflatten(0, (B, -1)).sum(1).to(dtype).transpose(0, 1) for partial in partials]


def _partial_sums(w: _Backward, programs: int) -> Tensor:
    """Of each program, `[programs, kinds, D]`."""
    return torch.empty(programs, w.kinds, w.dx.shape[2], dtype=torch.float32, device=w.dx.device)


def _strides(tensors: Sequence[Tensor | None], axis: int) -> tuple[int, ...]:
    """Of each stream's tensor, 0 where it has none."""
    return tuple(0 if tensor is None else tensor.stride(axis) for tensor in tensors)


def tile(size: int) -> tuple[int, int]:
    """Elements and warps of a Triton program that holds a token: 16 elements a thread; not tuned on a GPU yet."""
    block = 1 << (size - 1).bit_length()
    return block, min(16, max(1, block // 512))


_FORWARD = {"cpp": _forward_cpp, "triton": _forward_triton}
_BACKWARD = {"cpp": _backward_cpp, "triton": _backward_triton}
