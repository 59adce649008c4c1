"""LayerNorm followed by a scale and shift of each sample: how a transformer block takes its time and prompt (adaLN)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm

from fdfo_engine.ops import _checks, _compiled, _dispatch
from fdfo_engine.ops._checks import NORM_EPS

OFFERED = ("triton", "cpp", "torch")
TOKENS = 32  # tokens of a partial sum of a Triton program; not tuned on a GPU yet


@overload
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = NORM_EPS, backend: str | None = None
) -> Tensor: ...


@overload
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, scale2: Tensor, shift2: Tensor, eps: float = NORM_EPS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    eps: float = NORM_EPS,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`(x - mean) / sqrt(var + eps) * (1 + scale) + shift`, mean and variance of each token over its D elements.

    Differentiable once in `x` and in each modulation; gradients of modulations are summed over tokens, only where
    needed. Arithmetic is in float32, rounded once at each output and gradient.

    Args:
        x: tokens, `[B, S, D]`; float32, bfloat16 or float16. Strides of B and S may be any.
        scale, shift: the modulation, `[B, D]` of the dtype of `x`; may be views of a wider row.
        scale2, shift2: a second modulation of the same norm; both or neither.
        eps: added to the variance; >= 0.
        backend: None takes the fastest that runs on `x`'s device; a name of `ops.backends` forces one.

    Returns:
        Like `x`, contiguous; with a second modulation the tuple of both. Sums have a fixed order: two calls agree bit
        for bit.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device; one of scale2 and shift2.
        BackendUnavailableError: `backend` can't run on `x`'s device.

    Source: Peebles and Xie 2023 (adaLN); the second modulation is SD3.5-Medium's.
    """
    op = "layer_norm_modulate"
    _checks.tokens(op, "x", x)
    modulations = modulations_of(op, x, scale, shift, scale2, shift2)
    eps = _checks.not_negative(op, "eps", eps)
    implementation = _dispatch.choose(op, OFFERED, x.device, forced=backend)
    if implementation == "torch":
        found = layer_norm_modulate_reference(x.float(), modulations, eps, x.dtype)
    else:
        found = modulated_norms([(x, None, None, *modulations)], eps, implementation)[0][1:]
    return found[0] if scale2 is None else found


def layer_norm_modulate_reference(
    x: Tensor, modulations: tuple[Tensor, ...], eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The specification; x in float32, `modulations` are scale, shift and perhaps scale2, shift2."""
    normed = layer_norm(x, x.shape[-1:], eps=eps)
    wide = [m.float()[:, None] for m in modulations]
    return tuple((normed * (1 + wide[i]) + wide[i + 1]).to(dtype) for i in range(0, len(wide), 2))


def modulations_of(
    op: str, x: Tensor, scale: Tensor, shift: Tensor, scale2: Tensor | None, shift2: Tensor | None
) -> tuple[Tensor, ...]:
    """The two or four modulations of `x`, checked."""
    _checks.per_sample(op, "scale", scale, x)
    _checks.per_sample(op, "shift", shift, x)
    if scale2 is None and shift2 is None:
        return scale, shift
    if scale2 is None or shift2 is None:
        missing = "scale2" if scale2 is None else "shift2"
        _checks.refuse(op, missing, None, "a tensor where the other of scale2 and shift2 is given")
    _checks.per_sample(op, "scale2", scale2, x)
    _checks.per_sample(op, "shift2", shift2, x)
    return scale, shift, scale2, shift2


def modulated_norms(streams: Sequence[tuple[Tensor | None, ...]], eps: float, backend: str) -> list[tuple[Tensor, ...]]:
    """On a fast backend: x_new, which is x without a gate, and norms, of each stream of x, y, gate and modulations.

    The gradient of that x_new is added inside the norm's backward, like that of a sum.
    """
    flat = [t for stream in streams for t in (*stream, *[None] * (_FIELDS - len(stream)))]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat):
        outputs = iter(_ModulatedNorms.apply(eps, backend, *flat))
        return [tuple(next(outputs) for _ in range(_count(*stream[3:]))) for stream in streams]
    return _forward(_Inputs.of_streams(flat), eps, [None] * len(streams), backend)


_FIELDS = 7


def _count(*modulations: Tensor | None) -> int:
    """Outputs of a stream."""
    return 1 + sum(m is not None for m in modulations) // 2


class _Inputs(NamedTuple):
    """Tensors of a kernel: x, y `[B, S, D]`, the others `[B, D]`, with D contiguous."""

    x: Tensor
    y: Tensor | None
    gate: Tensor | None
    scale: Tensor
    shift: Tensor | None  # like shift2, not in a backward
    scale2: Tensor | None = None
    shift2: Tensor | None = None

    @classmethod
    def of_streams(cls, tensors: Sequence[Tensor | None]) -> list[_Inputs]:
        """Of each stream, out of `tensors`, copied where their last axis is not contiguous."""
        given = [*map(_compiled.last_contiguous, tensors)]
        return [cls(*given[i : i + _FIELDS]) for i in range(0, len(given), _FIELDS)]  # type: ignore[arg-type]


class _Gradients(NamedTuple):
    """What a backward kernel reads and writes. `sums`: gradients of gate and modulations have to be summed."""

    upstream: Tensor
    upstream2: Tensor | None
    upstream_x: Tensor | None
    dx: Tensor
    dy: Tensor | None
    sum_modulations: bool
    sum_gate: bool

    @classmethod
    def of(cls, inputs: _Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]) -> _Gradients:
        """Of a stream with these upstream gradients, not all None; `needed` of its inputs."""
        upstream_x, *given = map(_compiled.last_contiguous, upstream)
        first, *second = (torch.zeros_like(inputs.x) if u is None else u for u in given)
        dx = _compiled.empty_contiguous(first)
        dy = None if inputs.gate is None else _compiled.empty_contiguous(first)
        return cls(first, second[0] if second else None, upstream_x, dx, dy, any(needed[3:]), needed[2])

    @property
    def kinds(self) -> int:
        """Rows a sample that are sums over tokens: of scale, shift, scale2, shift2 and gate, in this order."""
        return self.sum_modulations * (2 if self.upstream2 is None else 4) + self.sum_gate


class _Work(NamedTuple):
    """Backward of one stream; `first` of its gradients among all."""

    first: int
    inputs: _Inputs
    statistics: Tensor
    gradients: _Gradients


class _ModulatedNorms(torch.autograd.Function):
    """`tensors`: the fields of `_Inputs` of each stream."""

    @staticmethod
    def forward(ctx: Any, eps: float, backend: str, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        streams, kept = _Inputs.of_streams(tensors), list[Tensor | None]()
        shapes = [s.x.shape[:2] for s in streams]
        statistics = [torch.empty(*shape, 2, dtype=torch.float32, device=streams[0].x.device) for shape in shapes]
        outputs = _forward(streams, eps, list(statistics), backend)
        for i, (s, of_stream, out) in enumerate(zip(streams, statistics, outputs, strict=True)):
            y = s.y if ctx.needs_input_grad[2 + _FIELDS * i + 2] else None
            kept += [of_stream, *s._replace(x=out[0], y=y, shift=None, shift2=None)]
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.counts = backend, [len(out) for out in outputs]
        return tuple(t for out in outputs for t in out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, rest, work = ctx.saved_tensors, iter(upstream), list[_Work]()
        grads: list[Tensor | None] = [None] * (2 + _FIELDS * len(ctx.counts))
        for i, count in enumerate(ctx.counts):
            statistics, *tensors = saved[(1 + _FIELDS) * i : (1 + _FIELDS) * (i + 1)]
            given, first = [next(rest) for _ in range(count)], 2 + _FIELDS * i
            if any(g is not None for g in given):
                inputs, needed = _Inputs(*tensors), ctx.needs_input_grad[first : first + _FIELDS]
                work.append(_Work(first, inputs, statistics, _Gradients.of(inputs, given, needed)))
        empty = [w for w in work if not w.gradients.dx.numel()]
        full = [w for w in work if w.gradients.dx.numel()]
        found_sums = _no_tokens(empty) + (_BACKWARD[ctx.backend](full) if full else [])
        for w, sums in zip(empty + full, found_sums, strict=True):
            g, modulations = w.gradients, sums[: w.gradients.kinds - w.gradients.sum_gate]
            found = g.dx, g.dy, sums[-1] if g.sum_gate else None, *modulations
            grads[w.first : w.first + len(found)] = found
        return tuple(grads)


def _forward(
    streams: Sequence[_Inputs], eps: float, statistics: Sequence[Tensor | None], backend: str
) -> list[tuple[Tensor, ...]]:
    """The outputs of each stream, x_new first."""
    outputs = [
        (s.x if s.gate is None else _compiled.empty_contiguous(s.x),
         *(_compiled.empty_contiguous(s.x) for _ in range(_count(*s[3:]) - 1)))
        for s in streams
    ]  # fmt: skip
    some = [i for i, s in enumerate(streams) if s.x.numel()]
    if some:
        _FORWARD[backend]([streams[i] for i in some], [statistics[i] for i in some], [outputs[i] for i in some], eps)
    return outputs


def _arguments(inputs: _Inputs, statistics: Tensor | None, eps: float) -> Any:
    x, y, *rows = inputs
    return _compiled.arguments(
        "LayerNormModulate", _compiled.strided(x), _compiled.strided(y), *map(_compiled.row_strided, rows),
        0 if statistics is None else statistics.data_ptr(), eps, x.shape, _compiled.NUMBERS[x.dtype],
    )  # fmt: skip


def _forward_cpp(
    streams: Sequence[_Inputs], statistics: Sequence[Tensor | None], outputs: Sequence[tuple[Tensor, ...]], eps: float
) -> None:
    for inputs, kept, of_stream in zip(streams, statistics, outputs, strict=True):
        x_new, *addresses = (out.data_ptr() for out in of_stream)
        out, out2 = addresses if len(addresses) == 2 else (addresses[0], 0)
        arguments = _arguments(inputs, kept, eps)
        _compiled.call(
            "layer_norm_modulate_forward", inputs.x.device, arguments, 0 if inputs.gate is None else x_new, out, out2
        )  # fmt: skip


def _backward_cpp(work: Sequence[_Work]) -> list[tuple[Tensor, ...]]:
    found = []
    for _, inputs, statistics, g in work:
        sums = _sums(inputs, g)
        _compiled.call(
            "layer_norm_modulate_backward", g.dx.device, _arguments(inputs, statistics, 0.0),
            *map(_compiled.strided, g[:3]), g.dx.data_ptr(), 0 if g.dy is None else g.dy.data_ptr(),
            sums[0].data_ptr() if g.sum_modulations else 0, sums[-1].data_ptr() if g.sum_gate else 0,
        )  # fmt: skip
        found.append(sums)
    return found


def _no_tokens(work: Sequence[_Work]) -> list[tuple[Tensor, ...]]:
    return [tuple(out.zero_() for out in _sums(w.inputs, w.gradients)) for w in work]


def _sums(inputs: _Inputs, g: _Gradients) -> tuple[Tensor, ...]:
    """Room for the gradients that are sums over tokens, one after the other in memory."""
    if g.kinds == 0:
        return ()
    return torch.empty(g.kinds, *inputs.scale.shape, dtype=g.dx.dtype, device=g.dx.device).unbind()


def _forward_triton(
    streams: Sequence[_Inputs], statistics: Sequence[Tensor | None], outputs: Sequence[tuple[Tensor, ...]], eps: float
) -> None:
    from fdfo_engine.kernels.layer_norm_modulate import layer_norm_modulate_forward_kernel  # triton: only where it runs

    x, targets = streams[0].x, []
    for s, out in zip(streams, outputs, strict=True):
        targets.append([None if s.gate is None else out[0], *out[1:], *[None] * (s.scale2 is None)])
    block, warps = tile(x.shape[2])
    with torch.cuda.device_of(x):  # triton launches on the current device, not on the tensor's
        layer_norm_modulate_forward_kernel[(sum(s.x.shape[0] * s.x.shape[1] for s in streams),)](
            *zip(*streams, strict=True), tuple(statistics), *zip(*targets, strict=True), len(x),
            tuple(s.x.shape[1] for s in streams), x.shape[2], *_token_strides([s.x for s in streams]),
            *_token_strides([s.y for s in streams]), *map(_row_strides, list(zip(*streams, strict=True))[2:]), eps,
            STREAMS=len(streams), BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _backward_triton(work: Sequence[_Work]) -> list[tuple[Tensor, ...]]:
    if len({w.gradients.sum_modulations for w in work}) > 1:
        return [sums for w in work for sums in _backward_triton([w])]
    from fdfo_engine.kernels.layer_norm_modulate import layer_norm_modulate_backward_kernel

    xs, ys, gates, scales, _, scale2s, _ = zip(*(w.inputs for w in work), strict=True)
    gradients = [w.gradients for w in work]
    tokens = TOKENS if any(g.kinds for g in gradients) else 1
    counts = [xs[0].shape[0] * -(-x.shape[1] // tokens) for x in xs]
    partials = tuple(
        torch.empty(count, g.kinds, x.shape[2], dtype=torch.float32, device=x.device)
        for count, g, x in zip(counts, gradients, xs, strict=True)
    )
    block, warps = tile(xs[0].shape[2])
    upstreams = [*zip(*(g[:5] for g in gradients), strict=True)]
    with torch.cuda.device_of(xs[0]):
        layer_norm_modulate_backward_kernel[(sum(counts),)](
            xs, ys, gates, scales, scale2s, tuple(w.statistics for w in work), *upstreams, partials, len(xs[0]),
            tuple(x.shape[1] for x in xs), xs[0].shape[2], *_token_strides(xs), *_token_strides(ys),
            *map(_row_strides, (gates, scales, scale2s)),
            *(strides for upstream in upstreams[:3] for strides in _token_strides(upstream)),
            STREAMS=len(work), SUM_MODULATIONS=gradients[0].sum_modulations, TOKENS=tokens, BLOCK=block,
            num_warps=2 * warps, enable_fp_fusion=False,
        )  # fmt: skip
    return [
        part.unflatten(0, (len(x), -1)).sum(1).to(x.dtype).unbind(1) if g.kinds else ()
        for part, x, g in zip(partials, xs, gradients, strict=True)
    ]


def _row_strides(rows: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(_compiled.row_strided(row)[1] for row in rows)


def _token_strides(tensors: Sequence[Tensor | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides of samples and of tokens, of each stream."""
    return tuple(_compiled.strided(t)[1] for t in tensors), tuple(_compiled.strided(t)[2] for t in tensors)


def tile(size: int) -> tuple[int, int]:
    """Elements and warps of a Triton program that holds a token: 16 elements a thread; not tuned on a GPU yet."""
    block = 1 << (size - 1).bit_length()
    return block, min(16, max(1, block // 512))


_FORWARD = {"cpp": _forward_cpp, "triton": _forward_triton}
_BACKWARD = {"cpp": _backward_cpp, "triton": _backward_triton}
