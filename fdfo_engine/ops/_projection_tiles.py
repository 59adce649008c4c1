"""Tiles of the Triton kernels in `kernels/lora_linear.py`: not tuned on a GPU yet."""

from __future__ import annotations

from typing import NamedTuple

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
FLOAT32_TILE = Tile(64, 64, 16, 8, 8, 4)  # with two stages the gradient of x spills on sm_100, with three GELU on sm_90
TILES = {
    (8, False): Tile(128, 128, 32, 8, 8, 3),
    (8, True): Tile(128, 128, 32, 8, 8, 3),
    (9, False): Tile(128, 256, 64, 8, 8, 3),
    (9, True): Tile(128, 128, 64, 8, 8, 4),
    (10, False): Tile(128, 128, 64, 8, 8, 4),
    (10, True): Tile(128, 128, 64, 8, 8, 4),
}
RANK_TILE = Tile(64, 0, 64, 0, 4, 2)  # of a product whose columns are the rank; three stages spill on sm_80
FLOAT32_RANK_TILE = Tile(32, 0, 16, 0, 8, 2)
END_TILE = Tile(64, 0, 64, 0, 8, 3)  # of a rank-r gradient through a gate or norm, which takes registers too
FLOAT32_END_TILE = Tile(32, 0, 16, 0, 8, 1)
FACTORS = Tile(32, 128, 0, 0, 4, 3)  # of the factors' gradients: rows a step
SPLITS = 8  # parts into which their rows are cut
SUM_BLOCK = 1024
MAX_RANK = 32  # columns of the rank that a program takes at once
RANK_LAYERS = 3  # layers whose rank-r products a program makes of one reading of x


def tile(dtype: torch.dtype, major: int, *, more: bool) -> Tile:
    """Tile of the large product; GPUs that are not in the table take the smallest, which fits any shared memory."""
    return FLOAT32_TILE if dtype == torch.float32 else TILES.get((major, more), TILES[8, more])


def tile_of(x: Tensor, *, more: bool) -> Tile:
    """Tile of the large product on the device of x; elsewhere than on a GPU, for the interpreter, any."""
    return tile(x.dtype, _dispatch.capability(x.device)[0] if x.is_cuda else 9, more=more)


def rank_tile(dtype: torch.dtype, *, through_end: bool = False) -> Tile:
    """Tile of a rank-r product, or of a rank-r gradient, which may go back through a gate or norm first."""
    narrow, short = (FLOAT32_END_TILE, END_TILE) if through_end else (FLOAT32_RANK_TILE, RANK_TILE)
    return narrow if dtype == torch.float32 else short


def rank_block(rank: int) -> int:
    """Columns of the rank that one block holds: a power of two, at least the 16 of a tensor core; 0 without rank."""
    return min(MAX_RANK, max(16, 1 << (rank - 1).bit_length())) if rank else 0


def wide(dtype: torch.dtype) -> bool:
    """Whether products take float32 operands: the interpreter's of bfloat16 are wrong."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _dispatch.interpreted())
