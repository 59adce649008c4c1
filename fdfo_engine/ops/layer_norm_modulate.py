"""LayerNorm followed by a scale and shift of each sample: how a transformer block takes its time and prompt (adaLN)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm

from fdfo_engine.ops import _checks, _compiled, _dispatch

OFFERED = ("triton", "cpp", "torch")
EPS = 1e-6
TOKENS = 32  # tokens of a partial sum of a Triton program; not tuned on a GPU yet


@overload
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = EPS, backend: str | None = None
) -> Tensor: ...


@overload
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, scale2: Tensor, shift2: Tensor, eps: float = EPS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    eps: float = EPS,
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
        found = modulated_norm(x, None, None, modulations, eps, implementation)
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


def modulated_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, modulations: tuple[Tensor, ...], eps: float, backend: str
) -> tuple[Tensor, ...]:
    """On a fast backend: `layer_norm_modulate`, or with y and gate `gated_residual_norm`."""
    tensors = x, y, gate, *modulations
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        found: tuple[Tensor, ...] = _ModulatedNorm.apply(eps, backend, *tensors)
        return found
    return _forward(_Inputs.of(*tensors), eps, None, backend)


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
    def of(cls, *tensors: Tensor | None) -> _Inputs:
        """`tensors`, copied where their last axis is not contiguous."""
        return cls(*map(_compiled.last_contiguous, tensors))  # type: ignore[arg-type]


class _Gradients(NamedTuple):
    """What a backward kernel reads and writes. `sums`: gradients of gate and modulations have to be summed."""

    upstream: Tensor
    upstream2: Tensor | None
    upstream_x: Tensor | None
    dx: Tensor
    dy: Tensor | None
    sum_modulations: bool
    sum_gate: bool

    @property
    def kinds(self) -> int:
        """Rows a sample that are sums over tokens: of scale, shift, scale2, shift2 and gate, in this order."""
        return self.sum_modulations * (2 if self.upstream2 is None else 4) + self.sum_gate


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, backend: str, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs = _Inputs.of(*tensors)
        x = inputs.x
        statistics = torch.empty(*x.shape[:2], 2, dtype=torch.float32, device=x.device)
        outputs = _forward(inputs, eps, statistics, backend)
        normed = x if inputs.gate is None else outputs[0]
        y = inputs.y if ctx.needs_input_grad[4] else None
        kept = inputs._replace(x=normed, y=y, shift=None, shift2=None)
        ctx.save_for_backward(statistics, *kept)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        statistics, *tensors = ctx.saved_tensors
        inputs, needed = _Inputs(*tensors), ctx.needs_input_grad[2:]
        if all(u is None for u in upstream):
            return None, None, *[None] * len(needed)
        given = [*map(_compiled.last_contiguous, upstream)]
        upstream_x = None if inputs.gate is None else given.pop(0)
        first, *second = (torch.zeros_like(inputs.x) if u is None else u for u in given)
        dx = _compiled.empty_contiguous(first)
        dy = None if inputs.gate is None else _compiled.empty_contiguous(first)
        g = _Gradients(first, second[0] if second else None, upstream_x, dx, dy, any(needed[3:]), needed[2])
        sums = (_BACKWARD[ctx.backend] if dx.numel() else _no_tokens)(inputs, statistics, g)
        d_modulations = sums[: len(needed) - 3] if g.sum_modulations else [None] * (len(needed) - 3)
        return None, None, dx, dy, sums[-1] if g.sum_gate else None, *d_modulations


def _forward(inputs: _Inputs, eps: float, statistics: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    """The outputs, x_new first where there is a gate."""
    x = inputs.x
    count = (inputs.gate is not None) + 1 + (inputs.scale2 is not None)
    outputs = tuple([_compiled.empty_contiguous(x) for _ in range(count)])
    if x.numel():
        _FORWARD[backend](inputs, eps, statistics, outputs)
    return outputs


def _arguments(inputs: _Inputs, statistics: Tensor | None, eps: float) -> Any:
    x, y, *rows = inputs
    return _compiled.arguments(
        "LayerNormModulate", _compiled.strided(x), _compiled.strided(y), *map(_compiled.row_strided, rows),
        0 if statistics is None else statistics.data_ptr(), eps, x.shape, _compiled.NUMBERS[x.dtype],
    )  # fmt: skip


def _forward_cpp(inputs: _Inputs, eps: float, statistics: Tensor | None, outputs: Sequence[Tensor]) -> None:
    addresses = [out.data_ptr() for out in outputs]
    x_new = 0 if inputs.gate is None else addresses.pop(0)
    out, out2 = addresses if len(addresses) == 2 else (addresses[0], 0)
    arguments = _arguments(inputs, statistics, eps)
    _compiled.call("layer_norm_modulate_forward", inputs.x.device, arguments, x_new, out, out2)


def _backward_cpp(inputs: _Inputs, statistics: Tensor, g: _Gradients) -> tuple[Tensor, ...]:
    sums = _sums(inputs, g)
    _compiled.call(
        "layer_norm_modulate_backward", g.dx.device, _arguments(inputs, statistics, 0.0),
        *map(_compiled.strided, g[:3]), g.dx.data_ptr(), 0 if g.dy is None else g.dy.data_ptr(),
        sums[0].data_ptr() if g.sum_modulations else 0, sums[-1].data_ptr() if g.sum_gate else 0,
    )  # fmt: skip
    return sums


def _no_tokens(inputs: _Inputs, _statistics: Tensor, g: _Gradients) -> tuple[Tensor, ...]:
    return tuple(out.zero_() for out in _sums(inputs, g))


def _sums(inputs: _Inputs, g: _Gradients) -> tuple[Tensor, ...]:
    """Room for the gradients that are sums over tokens, one after the other in memory."""
    if g.kinds == 0:
        return ()
    return torch.empty(g.kinds, *inputs.scale.shape, dtype=g.dx.dtype, device=g.dx.device).unbind()


def _forward_triton(inputs: _Inputs, eps: float, statistics: Tensor | None, outputs: Sequence[Tensor]) -> None:
    from fdfo_engine.kernels.layer_norm_modulate import layer_norm_modulate_forward_kernel  # triton: only where it runs

    x, y, *rows = inputs
    (B, S, D), residual, second = x.shape, inputs.gate is not None, inputs.scale2 is not None
    targets: list[Tensor | None] = [*[None] * (not residual), *outputs, *[None] * (not second)]
    block, warps = tile(D)
    with torch.cuda.device_of(x):  # triton launches on the current device, not on the tensor's
        layer_norm_modulate_forward_kernel[(B * S,)](
            *inputs, statistics, *targets, S, D,
            *_compiled.strided(x)[1:], *_compiled.strided(y)[1:], *(_compiled.row_strided(row)[1] for row in rows), eps,
            RESIDUAL=residual, SECOND=second, KEEP=statistics is not None, BLOCK=block, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip


def _backward_triton(inputs: _Inputs, statistics: Tensor, g: _Gradients) -> tuple[Tensor, ...]:
    from fdfo_engine.kernels.layer_norm_modulate import layer_norm_modulate_backward_kernel

    (B, S, D), tokens = inputs.x.shape, TOKENS if g.kinds else 1
    rows = inputs.gate, inputs.scale, inputs.scale2
    partial = torch.empty(B, -(-S // tokens), g.kinds, D, dtype=torch.float32, device=g.dx.device)
    block, warps = tile(D)
    with torch.cuda.device_of(g.dx):
        layer_norm_modulate_backward_kernel[(B * partial.shape[1],)](
            inputs.x, inputs.y, *rows, statistics, *g[:5], partial, S, D,
            *_compiled.strided(inputs.x)[1:], *_compiled.strided(inputs.y)[1:],
            *(_compiled.row_strided(row)[1] for row in rows),
            *(stride for upstream in g[:3] for stride in _compiled.strided(upstream)[1:]),
            RESIDUAL=inputs.gate is not None, SECOND=g.upstream2 is not None, UPSTREAM_X=g.upstream_x is not None,
            SUM_MODULATIONS=g.sum_modulations, SUM_GATE=g.sum_gate, KINDS=g.kinds, TOKENS=tokens, BLOCK=block,
            num_warps=2 * warps, enable_fp_fusion=False,
        )  # fmt: skip
    return partial.sum(1).to(g.dx.dtype).unbind(1)


def tile(size: int) -> tuple[int, int]:
    """Elements and warps of a Triton program that holds a token: 16 elements a thread; not tuned on a GPU yet."""
    block = 1 << (size - 1).bit_length()
    return block, min(16, max(1, block // 512))


_FORWARD = {"cpp": _forward_cpp, "triton": _forward_triton}
_BACKWARD = {"cpp": _backward_cpp, "triton": _backward_triton}
