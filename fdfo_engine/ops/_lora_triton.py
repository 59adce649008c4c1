"""`lora_linear` by Triton: the adapter's product runs on in the accumulator of the base layer's.

A launch takes all layers of both streams of tokens, given as tuples whose order `kernels/lora_linear.py` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdfo_engine.ops import _compiled, _dispatch
from fdfo_engine.ops._lora_torch import NOTHING, Gradients, Linear, Outputs, Streams, Wants, split_ranks


class Tile(NamedTuple):
    """Of a product: rows, columns and inner length of a block; tiles of rows that share columns; warps and stages."""

    rows: int
    columns: int
    inner: int
    group: int
    warps: int
    stages: int


# Not tuned on a GPU yet: as large as registers allow. float32 takes no tensor core; other dtypes go by the GPU's major
# compute capability and by whether more goes on than one product: GELU, or the sum over layers, takes registers too.
FLOAT32_TILE = Tile(64, 64, 16, 8, 8, 2)
TILES = {
    (8, False): Tile(128, 128, 32, 8, 8, 3),
    (8, True): Tile(128, 128, 32, 8, 8, 3),
    (9, False): Tile(128, 256, 64, 8, 8, 3),
    (9, True): Tile(128, 128, 64, 8, 8, 4),
    (10, False): Tile(128, 128, 64, 8, 8, 4),
    (10, True): Tile(128, 128, 64, 8, 8, 4),
}
THIN = Tile(64, 0, 64, 0, 4, 3)  # of the product with a thin factor; columns are the rank
FLOAT32_THIN = Tile(32, 0, 16, 0, 8, 2)
FACTORS = Tile(32, 128, 0, 0, 4, 3)  # of the factors' gradients: rows a step
SPLITS = 8  # parts into which their rows are cut
SUM_BLOCK = 1024
MAX_RANK = 32  # columns of the rank that a program takes at once
THIN_LAYERS = 3  # layers whose thin products a program makes of one reading of x


class HeadNorm(NamedTuple):
    """RMS norms of heads of `size` columns: the weights, one a layer, of which a stream's last is not read."""

    weights: Sequence[Tensor]
    size: int
    eps: float


class Used(NamedTuple):
    """A layer whose output was used: its gradient `[B, S, N]`, its thin product and `s g B`, `[M, r]`, where made."""

    grad: Tensor
    linear: Linear
    thin: Tensor | None
    thin_grad: Tensor | None
    place: int


def tile(dtype: torch.dtype, major: int, *, more: bool) -> Tile:
    """Tile of the large product; GPUs that are not in the table take the smallest, which fits any shared memory."""
    return FLOAT32_TILE if dtype == torch.float32 else TILES.get((major, more), TILES[8, more])


def thin_tile(dtype: torch.dtype) -> Tile:
    """Tile of a thin product."""
    return FLOAT32_THIN if dtype == torch.float32 else THIN


def rank_block(rank: int) -> int:
    """Columns of the rank that one block holds: a power of two, at least the 16 of a tensor core; 0 without rank."""
    return min(MAX_RANK, max(16, 1 << (rank - 1).bit_length())) if rank else 0


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
) -> list[Tensor]:
    """`residual + gate * linear(x)` of each stream; some linear has an adapter."""
    xs, outs = [_compiled.last_contiguous(x) for x in xs], [_compiled.empty_contiguous(r) for r, _ in residuals]
    given = [(_compiled.last_contiguous(r), _compiled.last_contiguous(gate)) for r, gate in residuals]
    product(xs, linears, _thin_products(xs, [[n] for n in linears], scaling), outs, residuals=given)
    return outs


def normed_products(xs: Sequence[Tensor], linears: Streams, scaling: float, norm: HeadNorm) -> list[Tensor]:
    """The layers of each stream, with norms of all but the last, each packed along tokens, `[B, sum S_i, N]`."""
    xs, tokens = [_compiled.last_contiguous(x) for x in xs], [x.shape[1] for x in xs]
    thins = _thin_products(xs, linears, scaling)
    packed = [xs[0].new_empty(len(xs[0]), sum(tokens), len(linear.weight)) for linear in linears[0]]
    outs = [part for parts in zip(*(t.split(tokens, 1) for t in packed), strict=True) for part in parts]
    parts = [part for thin, layers in zip(thins, linears, strict=True) for part in split_ranks(thin, layers)]
    product(xs, [linear for layers in linears for linear in layers], parts, outs, norm=norm)
    return packed


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
) -> list[Gradients]:  # fmt: skip
    """As `_lora_torch.backward`; the thin products are scaled already."""
    used = [_used(*stream) for stream in zip(grads, thins, linears, strict=True)]
    for some in _together([sum(u.thin_grad is not None for u in layers) for layers in used]):
        thin_gradients([[u for u in used[s] if u.thin_grad is not None] for s in some], scaling)
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


def _used(grads: Sequence[Tensor | None], thin: Tensor | None, layers: Sequence[Linear]) -> list[Used]:
    """Layers of a stream whose output was used, with room for `s g B`, which lies side by side."""
    live = [i for i, grad in enumerate(grads) if grad is not None]
    if not live:
        return []
    some, parts = [layers[i] for i in live], split_ranks(thin, layers)
    given = [_compiled.last_contiguous(grad) for grad in grads if grad is not None]
    rows, ranks = given[0].shape[0] * given[0].shape[1], sum(linear.rank for linear in some)
    thin_grads = split_ranks(given[0].new_empty(rows, ranks) if ranks else None, some)
    return [
        Used(grad, linear, parts[i], room, i)
        for grad, linear, room, i in zip(given, some, thin_grads, live, strict=True)
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
    grid = sum(-(-rows // t.rows) for rows in _rows(xs)), -(-max(ranks) // block)
    with torch.cuda.device_of(xs[0]):  # triton launches on the current device, not on the tensor's
        lora_linear_thin_kernel[grid](
            tuple(xs), _contiguous([linear.lora_a for linear in linears]), tuple(outs), *_places(xs),
            tuple(out.stride(0) for out in outs[::count]), tuple(ranks), xs[0].shape[2], scaling,
            STREAMS=streams, LAYERS=count, WIDE=wide(xs[0].dtype), ROWS=t.rows, RANK=block, INNER=t.inner,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip


def product(
    xs: Sequence[Tensor], linears: Sequence[Linear], thins: Sequence[Tensor | None], outs: Sequence[Tensor], *,
    h: Tensor | None = None, gelu: bool = False, residuals: Sequence[tuple[Tensor, Tensor]] = (),
    norm: HeadNorm | None = None,
) -> None:  # fmt: skip
    """`out = x W^T + thin B^T + bias` of each layer; equally many layers an x.

    Then GELU of that, which `h` gets, or `residual + gate * out`, or the `norm` of all but each stream's last layer.
    """
    from fdfo_engine.kernels.lora_linear import lora_linear_kernel  # triton: only where it runs

    count, ranks = len(linears) // len(xs), [linear.rank for linear in linears]
    biases = [_bias(linear) if any(one.bias is not None for one in linears) else None for linear in linears]
    added, gates = zip(*residuals, strict=True) if residuals else [(None,) * len(linears)] * 2
    t, rows = _tile(xs[0], more=gelu or bool(residuals)), _rows(xs)
    tiles = [-(-rows[i // count] // t.rows) * -(-len(linear.weight) // t.columns) for i, linear in enumerate(linears)]
    with torch.cuda.device_of(xs[0]):
        lora_linear_kernel[(sum(tiles),)](
            tuple(xs), _contiguous([linear.weight for linear in linears]), tuple(biases), _filled(thins),
            _contiguous(_filled([linear.lora_b for linear in linears])),
            (h,) if h is not None else (None,) * len(linears), added, gates,
            (None,) * len(linears) if norm is None else _contiguous(norm.weights), tuple(outs), *_places(xs),
            _row_strides(thins, count), tuple(len(linear.weight) for linear in linears), tuple(ranks),
            *_residual_places(residuals, len(linears)), tuple(map(_batch, outs)), xs[0].shape[2],
            0.0 if norm is None else norm.eps, STREAMS=len(xs), LAYERS=count, HEAD=0 if norm is None else norm.size,
            GELU=gelu, **_blocks(xs[0], t, ranks),
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
    t = _tile(dxs[0], more=count > 1 or h is not None)
    tiles = sum(-(-rows // t.rows) for rows in _rows(dxs)) * -(-dxs[0].shape[2] // t.columns)
    with torch.cuda.device_of(dxs[0]):
        lora_linear_input_kernel[(tiles,)](
            tuple(grads), tuple(weights), _filled(thins),
            _contiguous(_filled([linear.lora_a for linear in linears])), h, tuple(dxs), tuple(_rows(dxs)),
            tuple(dx.shape[1] for dx in dxs), _row_strides(thins, count), tuple(map(_batch, dxs)),
            *_gradient_places(grads, ranks), tuple(w.stride(0) for w in weights), dxs[0].shape[2], STREAMS=len(dxs),
            LAYERS=count,
            **_blocks(dxs[0], t, ranks),
        )  # fmt: skip


def thin_gradients(layers: Sequence[Sequence[Used]], scaling: float) -> None:
    """`s g B` of each layer, into its `thin_grad`; equally many layers in each stream."""
    from fdfo_engine.kernels.lora_linear import lora_linear_thin_gradient_kernel  # triton: only where it runs

    flat = [u for stream in layers for u in stream]
    grads, outs = [u.grad for u in flat], [u.thin_grad for u in flat]
    first, ranks, t = [stream[0].grad for stream in layers], [u.linear.rank for u in flat], thin_tile(grads[0].dtype)
    tiles, block = sum(-(-rows // t.rows) for rows in _rows(first)), rank_block(max(ranks))
    with torch.cuda.device_of(grads[0]):
        lora_linear_thin_gradient_kernel[(tiles, -(-max(ranks) // block), len(layers[0]))](
            tuple(grads), _contiguous([u.linear.lora_b for u in flat]), tuple(outs), tuple(_rows(first)),
            tuple(g.shape[1] for g in first), _row_strides(outs, len(layers[0])),
            *_gradient_places(grads, ranks), scaling,
            STREAMS=len(layers), LAYERS=len(layers[0]), WIDE=wide(grads[0].dtype), ROWS=t.rows, RANK=block,
            INNER=t.inner, num_warps=t.warps, num_stages=t.stages,
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
            tuple(xs), tuple(grads), tuple(thins), tuple(thin_grads), partial, *_places(xs), _row_strides(thins, count),
            _row_strides(thin_grads, count), *_gradient_places(grads, ranks), K, total, STREAMS=len(xs), LAYERS=count,
            SPLITS=SPLITS, WIDE=wide(xs[0].dtype), ROWS=FACTORS.rows, RANK=block, COLUMNS=FACTORS.columns,
            num_warps=FACTORS.warps, num_stages=FACTORS.stages,
        )  # fmt: skip
        lora_linear_sum_kernel[(-(-total // SUM_BLOCK),)](partial, out, total, SPLITS, BLOCK=SUM_BLOCK)
    parts = out.split(sizes)
    return [(a.view(r, K), b.view(-1, r)) for a, b, r in zip(parts[::2], parts[1::2], ranks, strict=True)]


def wide(dtype: torch.dtype) -> bool:
    """Whether products take float32 operands: the interpreter's of bfloat16 are wrong."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _dispatch.interpreted())


def _tile(x: Tensor, *, more: bool) -> Tile:
    return tile(x.dtype, torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9, more=more)


def _blocks(x: Tensor, t: Tile, ranks: Sequence[int]) -> dict[str, Any]:
    """Constants and launch options of a large product."""
    return {
        "WIDE": wide(x.dtype), "ROWS": t.rows, "COLUMNS": t.columns, "INNER": t.inner, "GROUP": t.group,
        "RANK": rank_block(max(ranks)), "num_warps": t.warps, "num_stages": t.stages,
    }  # fmt: skip


def _rows(xs: Sequence[Tensor]) -> list[int]:
    return [x.shape[0] * x.shape[1] for x in xs]


def _batch(x: Tensor) -> int:
    """Stride from sample to sample; 0 where there is one, whose stride may be past 32 bits."""
    return x.stride(0) if len(x) > 1 else 0


def _places(xs: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Rows, tokens a sample, and strides of samples and rows of each stream."""
    return tuple(_rows(xs)), tuple(x.shape[1] for x in xs), tuple(map(_batch, xs)), tuple(x.stride(1) for x in xs)


def _gradient_places(grads: Sequence[Tensor], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Columns, ranks, and strides of samples and rows, of each layer's gradient."""
    columns, rows = tuple(g.shape[2] for g in grads), tuple(g.stride(1) for g in grads)
    return columns, tuple(ranks), tuple(map(_batch, grads)), rows


def _residual_places(residuals: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[tuple[int, ...], ...]:
    """Strides of samples and rows of each residual, and of rows of its gate."""
    if not residuals:
        return ((0,) * count,) * 3
    streams, gates = zip(*residuals, strict=True)
    return tuple(map(_batch, streams)), tuple(r.stride(1) for r in streams), tuple(map(_batch, gates))


def _row_strides(thins: Sequence[Tensor | None], count: int) -> tuple[int, ...]:
    """Of the thin products of each stream of `count` layers; all of its layers lie in one tensor."""
    streams = [thins[i : i + count] for i in range(0, len(thins), count)]
    return tuple(next((thin.stride(0) for thin in stream if thin is not None), 0) for stream in streams)


def _bias(linear: Linear) -> Tensor:
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias.contiguous()


def _filled(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """With another one in the place of each that is not there, which is not read; Nones where there is none."""
    some = next((t for t in tensors if t is not None), None)
    return tuple(some if t is None else t for t in tensors)


def _contiguous(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)
