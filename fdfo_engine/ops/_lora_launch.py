"""What the Triton kernels of `lora_linear` are launched with: tiles, not tuned on a GPU yet, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdfo_engine.ops import _dispatch


class Tile(NamedTuple):
    """Of a product: rows, columns and inner length of a block; tiles of rows that share columns; warps and stages."""

    rows: int
    columns: int
    inner: int
    group: int
    warps: int
    stages: int


# As large as registers allow. float32 takes no tensor core; other dtypes go by the GPU's major
# compute capability and by whether more goes on than one product: GELU, or the sum over layers, takes registers too.
FLOAT32_TILE = Tile(64, 64, 16, 8, 8, 3)  # with two stages the gradient of x spills on sm_100
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
BEHIND = Tile(64, 0, 64, 0, 8, 3)  # with a gate or norm behind the large product, which takes registers too
FLOAT32_BEHIND = Tile(32, 0, 16, 0, 8, 1)
FACTORS = Tile(32, 128, 0, 0, 4, 3)  # of the factors' gradients: rows a step
SPLITS = 8  # parts into which their rows are cut
SUM_BLOCK = 1024
MAX_RANK = 32  # columns of the rank that a program takes at once
THIN_LAYERS = 3  # layers whose thin products a program makes of one reading of x


def tile(dtype: torch.dtype, major: int, *, more: bool) -> Tile:
    """Tile of the large product; GPUs that are not in the table take the smallest, which fits any shared memory."""
    return FLOAT32_TILE if dtype == torch.float32 else TILES.get((major, more), TILES[8, more])


def thin_tile(dtype: torch.dtype, *, more: bool = False) -> Tile:
    """Tile of a thin product; `more` where it goes back through a gate or norm first."""
    narrow, short = (FLOAT32_BEHIND, BEHIND) if more else (FLOAT32_THIN, THIN)
    return narrow if dtype == torch.float32 else short


def rank_block(rank: int) -> int:
    """Columns of the rank that one block holds: a power of two, at least the 16 of a tensor core; 0 without rank."""
    return min(MAX_RANK, max(16, 1 << (rank - 1).bit_length())) if rank else 0


def wide(dtype: torch.dtype) -> bool:
    """Whether products take float32 operands: the interpreter's of bfloat16 are wrong."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _dispatch.interpreted())


def tile_of(x: Tensor, *, more: bool) -> Tile:
    """Tile of the large product on the device of x; elsewhere than on a GPU, for the interpreter, any."""
    return tile(x.dtype, torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9, more=more)


def blocks(x: Tensor, t: Tile, ranks: Sequence[int]) -> dict[str, Any]:
    """Constants and launch options of a large product."""
    return {
        "WIDE": wide(x.dtype), "ROWS": t.rows, "COLUMNS": t.columns, "INNER": t.inner, "GROUP": t.group,
        "RANK": rank_block(max(ranks)), "num_warps": t.warps, "num_stages": t.stages,
    }  # fmt: skip


def row_counts(xs: Sequence[Tensor]) -> list[int]:
    """Rows of each stream."""
    return [x.shape[0] * x.shape[1] for x in xs]


def sample_stride(x: Tensor) -> int:
    """Stride from sample to sample; 0 where there is one, whose stride may be past 32 bits."""
    return x.stride(0) if len(x) > 1 else 0


def places(xs: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Rows, tokens a sample, and strides of samples and rows of each stream."""
    tokens, strides = tuple(x.shape[1] for x in xs), tuple(x.stride(1) for x in xs)
    return tuple(row_counts(xs)), tokens, tuple(map(sample_stride, xs)), strides


def gradient_places(grads: Sequence[Tensor], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Columns, ranks, and strides of samples and rows, of each layer's gradient."""
    columns, rows = tuple(g.shape[2] for g in grads), tuple(g.stride(1) for g in grads)
    return columns, tuple(ranks), tuple(map(sample_stride, grads)), rows


def residual_places(residuals: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[tuple[int, ...], ...]:
    """Strides of samples and rows of each residual, and of rows of its gate."""
    if not residuals:
        return ((0,) * count,) * 3
    streams, gates = zip(*residuals, strict=True)
    return tuple(map(sample_stride, streams)), tuple(r.stride(1) for r in streams), tuple(map(sample_stride, gates))


def row_strides(thins: Sequence[Tensor | None], count: int) -> tuple[int, ...]:
    """Of the thin products of each stream of `count` layers; all of its layers lie in one tensor."""
    streams = [thins[i : i + count] for i in range(0, len(thins), count)]
    return tuple(next((thin.stride(0) for thin in stream if thin is not None), 0) for stream in streams)
