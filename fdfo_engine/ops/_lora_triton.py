"""`lora_linear` by Triton: the adapter's product runs on in the accumulator of the base layer's.

A launch takes all layers of both streams of tokens, given as tuples whose order `kernels/lora_linear.py` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdfo_engine.ops import _compiled
from fdfo_engine.ops._lora_launch import (
    FACTORS,
    SPLITS,
    SUM_BLOCK,
    THIN_LAYERS,
    blocks,
    gradient_places,
    places,
    rank_block,
    residual_places,
    row_counts,
    row_strides,
    sample_stride,
    thin_tile,
    tile_of,
    wide,
)
from fdfo_engine.ops._lora_torch import NOTHING, Gradients, Linear, Outputs, Streams, Wants, split_ranks


class HeadNorm(NamedTuple):
    """RMS norms of heads of `size` columns: the weights, one a layer, of which a stream's last is not read."""

    weights: Sequence[Tensor]
    size: int
    eps: float


class Normed(NamedTuple):
    """What a norm by heads left for its backward: the output `[B, S, N]`, its weight, and 1 / rms `[B, S, heads]`."""

    y: Tensor
    weight: Tensor
    roots: Tensor


class Behind(NamedTuple):
    """What came behind the product of a layer: a gate `[B, N]` into a residual, or a norm."""

    gate: Tensor | None = None
    normed: Normed | None = None

    @property
    def changes(self) -> bool:
        """Whether the product's gradient is another than that of the layer's output."""
        return self.gate is not None or self.normed is not None


class Used(NamedTuple):
    """A layer whose output was used: its gradient `[B, S, N]`, its thin product and `s g B`, `[M, r]`, where made.

    With something behind the product, `raw` is room for the gradient of the product itself.
    """

    grad: Tensor
    linear: Linear
    thin: Tensor | None
    thin_grad: Tensor | None
    place: int
    behind: Behind = Behind()
    raw: Tensor | None = None


def takes_gelu(backend: str, dtype: torch.dtype) -> bool:
    """Whether GELU is taken inside a product of ours, which saves a pass each way; float32 is left to cuBLAS."""
    return backend == "triton" and dtype != torch.float32


def forward(
    xs: Sequence[Tensor], linears: Streams, scaling: float, *, gelu: bool, keep: bool, packed: bool, backend: str
) -> Outputs:
    """As `_lora_torch.forward`."""
    xs, (y, joined) = [_compiled.last_contiguous(x) for x in xs], _room(xs, linears, packed=packed)
    thins = _thin_products(xs, linears, scaling)
    h = torch.empty_like(y[0][0]) if gelu and keep else None
    for some in _together([len(layers) for layers in linears]):
        layers = [linear for s in some for linear in linears[s]]
        parts = [part for s in some for part in split_ranks(thins[s], linears[s])]
        product([xs[s] for s in some], layers, parts, [out for s in some for out in y[s]], h=h, gelu=gelu)
    if packed:
        y = [outs[:-1] for outs in y]
    return Outputs(y, joined, [] if h is None else [h], thins)


def residual_sums(
    xs: Sequence[Tensor], linears: Sequence[Linear], scaling: float, residuals: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """`residual + gate * linear(x)` of each stream, some of whose linears have an adapter; and the thin products."""
    xs, outs = [_compiled.last_contiguous(x) for x in xs], [_compiled.empty_contiguous(r) for r, _ in residuals]
    given = [(_compiled.last_contiguous(r), _compiled.last_contiguous(gate)) for r, gate in residuals]
    thins = _thin_products(xs, [[n] for n in linears], scaling)
    product(xs, linears, thins, outs, residuals=given)
    return outs, thins


def normed_products(
    xs: Sequence[Tensor], linears: Streams, scaling: float, norm: HeadNorm, *, keep: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """The layers of each stream, with norms of all but the last, each packed along tokens, `[B, sum S_i, N]`.

    And if `keep`, 1 / rms of the heads of each normed layer, packed likewise; and the thin products of each stream.
    """
    xs, tokens = [_compiled.last_contiguous(x) for x in xs], [x.shape[1] for x in xs]
    thins = _thin_products(xs, linears, scaling)
    packed = [xs[0].new_empty(len(xs[0]), sum(tokens), len(linear.weight)) for linear in linears[0]]
    heads = packed[0].shape[2] // norm.size
    roots = [t.new_empty(*t.shape[:2], heads, dtype=torch.float32) for t in packed[:-1]] if keep else []
    parts = [part for thin, layers in zip(thins, linears, strict=True) for part in split_ranks(thin, layers)]
    product(
        xs, [linear for layers in linears for linear in layers], parts, _by_stream(packed, tokens), norm=norm,
        roots=_by_stream([*roots, roots[0]], tokens) if roots else (),
    )  # fmt: skip
    return packed, roots, thins


def _by_stream(packed: Sequence[Tensor], tokens: Sequence[int]) -> list[Tensor]:
    """Parts of tensors `[B, sum S_i, any]`: of all of them those of the first stream, then those of the second."""
    return [part for parts in zip(*(t.split(tokens, 1) for t in packed), strict=True) for part in parts]


def _room(xs: Sequence[Tensor], linears: Streams, *, packed: bool) -> tuple[list[list[Tensor]], Tensor | None]:
    """Outputs of each layer, the last ones as views of one tensor if `packed`, and that tensor."""
    y = [
        [x.new_empty(*x.shape[:2], len(linear.weight)) for linear in layers[: len(layers) - packed]]
        for x, layers in zip(xs, linears, strict=True)
    ]
    if not packed:
        return y, None
    joined = xs[0].new_empty(len(xs[0]), sum(x.shape[1] for x in xs), len(linears[0][-1].weight))
    for outs, part in zip(y, joined.split([x.shape[1] for x in xs], 1), strict=True):
        outs.append(part)
    return y, joined


def backward(
    grads: Sequence[Sequence[Tensor | None]], xs: Sequence[Tensor | None], thins: Sequence[Tensor | None],
    linears: Streams, scaling: float, wants: Sequence[Sequence[Wants]], dxs: Sequence[Tensor | None],
    behind: Sequence[Sequence[Behind]] = (),
) -> list[Gradients]:  # fmt: skip
    """As `_lora_torch.backward`; the thin products are scaled already. `behind` is of each layer, if anything."""
    after = behind or [[Behind()] * len(layers) for layers in linears]
    used = [_used(*stream) for stream in zip(grads, thins, linears, after, strict=True)]
    passed = [[u for u in layers if u.thin_grad is not None or u.raw is not None] for layers in used]
    for some in _together([len(layers) for layers in passed]):
        thin_gradients([passed[s] for s in some], scaling)
    used = [[u if u.raw is None else u._replace(grad=u.raw) for u in layers] for layers in used]
    for dx, layers in zip(dxs, used, strict=True):
        if dx is not None and not layers:
            dx.zero_()
    for some in _together([len(layers) if dx is not None else 0 for dx, layers in zip(dxs, used, strict=True)]):
        input_product([used[s] for s in some], [dx for s in some if (dx := dxs[s]) is not None])
    found = [[NOTHING] * len(layers) for layers in linears]
    trained = [
        [u for u in layers if u.thin is not None and u.thin_grad is not None and any(want[u.place][2:])]
        for layers, want in zip(used, wants, strict=True)
    ]
    for some in _together([len(layers) for layers in trained]):
        pairs = iter(factor_gradients([x for s in some if (x := xs[s]) is not None], [trained[s] for s in some]))
        for s in some:
            for u in trained[s]:
                da, db = next(pairs)
                want_a, want_b = wants[s][u.place][2:]
                found[s][u.place] = (None, None, da if want_a else None, db if want_b else None)
    for s, layers in enumerate(used):
        for u in layers:
            whole = _whole_gradients(u.grad, xs[s], wants[s][u.place])
            found[s][u.place] = (*whole, *found[s][u.place][2:])
    return [four for of_stream in found for four in of_stream]


def _used(
    grads: Sequence[Tensor | None], thin: Tensor | None, layers: Sequence[Linear], behind: Sequence[Behind]
) -> list[Used]:
    """Layers of a stream whose output was used, with room for `s g B`, which lies side by side."""
    live = [i for i, grad in enumerate(grads) if grad is not None]
    if not live:
        return []
    some, parts = [layers[i] for i in live], split_ranks(thin, layers)
    given = [_compiled.last_contiguous(grad) for grad in grads if grad is not None]
    rows, ranks = given[0].shape[0] * given[0].shape[1], sum(linear.rank for linear in some)
    thin_grads = split_ranks(given[0].new_empty(rows, ranks) if ranks else None, some)
    raws = [g.new_empty(g.shape) if behind[i].changes else None for g, i in zip(given, live, strict=True)]
    return [
        Used(grad, linear, parts[i], room, i, behind[i], raw)
        for grad, linear, room, i, raw in zip(given, some, thin_grads, live, raws, strict=True)
    ]


def _whole_gradients(grad: Tensor, x: Tensor | None, wants: Wants) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias."""
    rows = grad.flatten(0, 1) if any(wants[:2]) else grad
    return rows.T @ x.flatten(0, 1) if wants[0] and x is not None else None, rows.sum(0) if wants[1] else None


def _together(counts: Sequence[int]) -> list[list[int]]:
    """Streams that one launch takes: all that have layers, if equally many, else each by itself."""
    some = [s for s, count in enumerate(counts) if count]
    return [some] if some and len({counts[s] for s in some}) == 1 else [[s] for s in some]


def _thin_products(xs: Sequence[Tensor], linears: Streams, scaling: float) -> list[Tensor | None]:
    """`s x A^T` of all adapters of each stream, side by side, `[M, ranks]`."""
    ranks = [sum(linear.rank for linear in layers) for layers in linears]
    thins = [x.new_empty(x.shape[0] * x.shape[1], r) if r else None for x, r in zip(xs, ranks, strict=True)]
    made = [
        [(linear, part) for linear, part in zip(layers, split_ranks(thin, layers), strict=True) if part is not None]
        for layers, thin in zip(linears, thins, strict=True)
    ]
    for first in range(0, max(map(len, made)), THIN_LAYERS):
        some_layers = [layers[first : first + THIN_LAYERS] for layers in made]
        for some in _together([len(layers) for layers in some_layers]):
            thin_product([xs[s] for s in some], [pair for s in some for pair in some_layers[s]], scaling)
    return thins


def thin_product(xs: Sequence[Tensor], layers: Sequence[tuple[Linear, Tensor]], scaling: float) -> None:
    """`s x A^T` of each layer into the `[M, r]` beside it; equally many layers for each x."""
    from fdfo_engine.kernels.lora_linear import lora_linear_thin_kernel  # triton: only where it runs

    linears, outs = zip(*layers, strict=True)
    streams, count, ranks = len(xs), len(layers) // len(xs), [linear.rank for linear in linears]
    t = thin_tile(xs[0].dtype)
    block = rank_block(max(ranks))
    grid = sum(-(-rows // t.rows) for rows in row_counts(xs)), -(-max(ranks) // block)
    with torch.cuda.device_of(xs[0]):  # triton launches on the current device, not on the tensor's
        lora_linear_thin_kernel[grid](
            tuple(xs), _contiguous([linear.lora_a for linear in linears]), tuple(outs), *places(xs),
            tuple(out.stride(0) for out in outs[::count]), tuple(ranks), xs[0].shape[2], scaling,
            STREAMS=streams, LAYERS=count, WIDE=wide(xs[0].dtype), ROWS=t.rows, RANK=block, INNER=t.inner,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip


def product(
    xs: Sequence[Tensor], linears: Sequence[Linear], thins: Sequence[Tensor | None], outs: Sequence[Tensor], *,
    h: Tensor | None = None, gelu: bool = False, residuals: Sequence[tuple[Tensor, Tensor]] = (),
    norm: HeadNorm | None = None, roots: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    """`out = x W^T + thin B^T + bias` of each layer; equally many layers an x.

    Then GELU of that, which `h` gets, or `residual + gate * out`, or the `norm` of all but each stream's last layer,
    whose 1 / rms `roots` get, if given.
    """
    from fdfo_engine.kernels.lora_linear import lora_linear_kernel  # triton: only where it runs

    count, ranks = len(linears) // len(xs), [linear.rank for linear in linears]
    biases = [_bias(linear) if any(one.bias is not None for one in linears) else None for linear in linears]
    added, gates = zip(*residuals, strict=True) if residuals else [(None,) * len(linears)] * 2
    t, rows = tile_of(xs[0], more=gelu or bool(residuals)), row_counts(xs)
    tiles = [-(-rows[i // count] // t.rows) * -(-len(linear.weight) // t.columns) for i, linear in enumerate(linears)]
    with torch.cuda.device_of(xs[0]):
        lora_linear_kernel[(sum(tiles),)](
            tuple(xs), _contiguous([linear.weight for linear in linears]), tuple(biases), _filled(thins),
            _contiguous(_filled([linear.lora_b for linear in linears])),
            (h,) if h is not None else (None,) * len(linears), added, gates,
            (None,) * len(linears) if norm is None else _contiguous(norm.weights),
            tuple(roots) or (None,) * len(linears), tuple(outs), *places(xs), row_strides(thins, count),
            tuple(len(linear.weight) for linear in linears), tuple(ranks),
            *residual_places(residuals, len(linears)), tuple(map(sample_stride, outs)), xs[0].shape[2],
            0.0 if norm is None else norm.eps, STREAMS=len(xs), LAYERS=count, HEAD=0 if norm is None else norm.size,
            GELU=gelu, **blocks(xs[0], t, ranks),
        )  # fmt: skip


def gelu_product(x: Tensor, linear: Linear, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """`gelu(x W^T + bias)` of rows `[M, K]`, and what GELU was taken of if `keep`."""
    out = x.new_empty(1, len(x), len(linear.weight))
    h = torch.empty_like(out) if keep else None
    product([_compiled.last_contiguous(x)[None]], [linear], [None], [out], h=h, gelu=True)
    return out[0], None if h is None else h[0]


def gelu_gradient(grad: Tensor, linear: Linear, h: Tensor) -> Tensor:
    """`(grad W) * gelu'(h)` of rows `[M, N]`: the backward of GELU and of the layer after it."""
    out = torch.empty_like(h)[None]
    input_product([[Used(_compiled.last_contiguous(grad)[None], linear, None, None, 0)]], [out], h=h)
    return out[0]


def input_product(layers: Sequence[Sequence[Used]], dxs: Sequence[Tensor], *, h: Tensor | None = None) -> None:
    """`dx = sum_i g_i W_i + (s g_i B_i) A_i` of each stream, times GELU's slope at `h`; equally many layers each."""
    from fdfo_engine.kernels.lora_linear import lora_linear_input_kernel  # triton: only where it runs

    flat = [u for stream in layers for u in stream]
    grads, linears, ranks = [u.grad for u in flat], [u.linear for u in flat], [u.linear.rank for u in flat]
    thins, count = [u.thin_grad for u in flat], len(layers[0])
    weights = [_compiled.last_contiguous(linear.weight) for linear in linears]  # perhaps columns of a wider one
    t = tile_of(dxs[0], more=count > 1 or h is not None)
    tiles = sum(-(-rows // t.rows) for rows in row_counts(dxs)) * -(-dxs[0].shape[2] // t.columns)
    with torch.cuda.device_of(dxs[0]):
        lora_linear_input_kernel[(tiles,)](
            tuple(grads), tuple(weights), _filled(thins),
            _contiguous(_filled([linear.lora_a for linear in linears])), h, tuple(dxs), tuple(row_counts(dxs)),
            tuple(dx.shape[1] for dx in dxs), row_strides(thins, count), tuple(map(sample_stride, dxs)),
            *gradient_places(grads, ranks), tuple(w.stride(0) for w in weights), dxs[0].shape[2], STREAMS=len(dxs),
            LAYERS=count,
            **blocks(dxs[0], t, ranks),
        )  # fmt: skip


def thin_gradients(layers: Sequence[Sequence[Used]], scaling: float) -> None:
    """`s g B` of each layer into its `thin_grad`, and g into `raw`, where these are; equally many layers a stream."""
    from fdfo_engine.kernels.lora_linear import lora_linear_thin_gradient_kernel  # triton: only where it runs

    flat = [u for stream in layers for u in stream]
    grads, outs = [u.grad for u in flat], [u.thin_grad for u in flat]
    first, ranks = [stream[0].grad for stream in layers], [u.linear.rank for u in flat]
    t = thin_tile(grads[0].dtype, more=any(u.behind.changes for u in flat))
    tiles, block = sum(-(-rows // t.rows) for rows in row_counts(first)), rank_block(max(*ranks, 1))
    gates, normed = [_compiled.last_contiguous(u.behind.gate) for u in flat], [u.behind.normed for u in flat]
    size = next((n.y.shape[2] // n.roots.shape[2] for n in normed if n is not None), 1)
    with torch.cuda.device_of(grads[0]):
        lora_linear_thin_gradient_kernel[(tiles, max(1, -(-max(ranks) // block)), len(layers[0]))](
            tuple(grads), _factors(flat), _filled(outs, grads[0]), tuple(gates), *_norms(normed),
            _filled([u.raw for u in flat]), tuple(row_counts(first)), tuple(g.shape[1] for g in first),
            row_strides(outs, len(layers[0])), *gradient_places(grads, ranks),
            tuple(0 if gate is None else sample_stride(gate) for gate in gates),
            tuple(0 if n is None else sample_stride(n.y) for n in normed), scaling, STREAMS=len(layers),
            LAYERS=len(layers[0]), NORMED=sum((n is not None) << i for i, n in enumerate(normed)), HEAD=size,
            WIDE=wide(grads[0].dtype), ROWS=t.rows, RANK=block, INNER=max(t.inner, size), num_warps=t.warps,
            num_stages=t.stages,
        )  # fmt: skip


def factor_gradients(xs: Sequence[Tensor], layers: Sequence[Sequence[Used]]) -> list[tuple[Tensor, Tensor]]:
    """dA `[r, K]` and dB `[N, r]` of each layer, float32: partial sums over parts of the rows, then their sum."""
    from fdfo_engine.kernels.lora_linear import lora_linear_factors_kernel, lora_linear_sum_kernel

    flat, K, count = [u for stream in layers for u in stream], xs[0].shape[2], len(layers[0])
    xs, ranks, grads = [_compiled.last_contiguous(x) for x in xs], [u.linear.rank for u in flat], [u.grad for u in flat]
    sizes = [rank * size for rank, g in zip(ranks, grads, strict=True) for size in (K, g.shape[2])]
    total, block = sum(sizes), rank_block(max(ranks))
    thins, thin_grads = [u.thin for u in flat], [u.thin_grad for u in flat]
    partial = torch.empty(SPLITS, total, dtype=torch.float32, device=xs[0].device)
    out = torch.empty(total, dtype=torch.float32, device=xs[0].device)
    tiles = sum(-(-K // FACTORS.columns) + -(-u.grad.shape[2] // FACTORS.columns) for u in flat)
    with torch.cuda.device_of(out):
        lora_linear_factors_kernel[(tiles, -(-max(ranks) // block), SPLITS)](
            tuple(xs), tuple(grads), tuple(thins), tuple(thin_grads), partial, *places(xs), row_strides(thins, count),
            row_strides(thin_grads, count), *gradient_places(grads, ranks), K, total, STREAMS=len(xs), LAYERS=count,
            SPLITS=SPLITS, WIDE=wide(xs[0].dtype), ROWS=FACTORS.rows, RANK=block, COLUMNS=FACTORS.columns,
            num_warps=FACTORS.warps, num_stages=FACTORS.stages,
        )  # fmt: skip
        lora_linear_sum_kernel[(-(-total // SUM_BLOCK),)](partial, out, total, SPLITS, BLOCK=SUM_BLOCK)
    parts = out.split(sizes)
    return [(a.view(r, K), b.view(-1, r)) for a, b, r in zip(parts[::2], parts[1::2], ranks, strict=True)]


def _bias(linear: Linear) -> Tensor:
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias.contiguous()


def _filled(tensors: Sequence[Tensor | None], other: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """With another one in the place of each that is not there, which is not read; `other` where there is none."""
    some = next((t for t in tensors if t is not None), other)
    return tuple(some if t is None else t for t in tensors)


def _factors(layers: Sequence[Used]) -> tuple[Tensor | None, ...]:
    """The second factor of each layer."""
    return _contiguous(_filled([u.linear.lora_b for u in layers], layers[0].grad.new_empty(1, dtype=torch.float32)))


def _norms(normed: Sequence[Normed | None]) -> list[tuple[Tensor | None, ...]]:
    """Weights, outputs and 1 / rms of the norms of each layer."""
    weights, outputs, roots = ([None if n is None else n[i] for n in normed] for i in (1, 0, 2))
    return [_contiguous(_filled(weights)), _filled(outputs), _filled(roots)]


def _contiguous(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)
