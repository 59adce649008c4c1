"""adaLN: what time and prompt add to the norms of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.nn.functional import silu

from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.linear import project

Rows = Sequence[Tensor | None]
"""A row `[B, n * D]` of each modulation layer of a block; None where the block makes it itself."""


class Modulation(NamedTuple):
    """Shift and scale of a norm, `[B, D]`, and the gate through which what reads it leads back."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def modulations(row: Tensor, count: int) -> list[Modulation]:
    """`count` of them, which lie in a row one after the other."""
    return [Modulation(*part.chunk(3, 1)) for part in row.chunk(count, 1)]


class Modulated(Protocol):
    """A fused block with modulated norms."""

    def modulation_layers(self) -> Sequence[Any]:
        """The linear layers that make its rows, as they are now: LoRA wraps them."""


def rows_of(block: Modulated, temb: Tensor, rows: Rows | None) -> list[Tensor]:
    """The rows that a block's modulation layers make of `temb`, where they aren't made yet."""
    layers = block.modulation_layers()
    given = [None] * len(layers) if rows is None else rows
    return [project(layer, silu(temb)) if row is None else row for layer, row in zip(layers, given, strict=True)]


class Modulations:
    """The rows of all blocks, by one product where the frozen weights of their layers lie together."""

    def __init__(self, blocks: Sequence[Modulated], norm_out: Any, *, rehome: bool) -> None:
        self.blocks, self.norm_out = blocks, norm_out
        self.joint = JointWeights.of(self._layers()) if rehome else None

    def __call__(self, temb: Tensor) -> tuple[list[Rows], Tensor | None]:
        """The rows of each block, and of the norm behind them; None where each layer has to make its own."""
        layers = self._layers()
        rows: list[Tensor | None] = [None] * len(layers)
        if self.joint is not None and self.joint.runs(layers):
            rows = list(self.joint.together(silu(temb)))
        rest = iter(rows)
        return [[next(rest) for _ in block.modulation_layers()] for block in self.blocks], next(rest)

    def _layers(self) -> list[Any]:
        return [*(layer for block in self.blocks for layer in block.modulation_layers()), self.norm_out.linear]
