"""(sample, step) items: what a share of an optimiser step is cut into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Items:
    """(sample, step) items of this rank, int64 `[B]` each; `pair` is a row of the rollout; weight 0 pads."""

    pair: Tensor
    branch: Tensor
    step: Tensor
    weight: float = 1.0

    @classmethod
    def of_pairs(cls, pairs: Tensor, share: Tensor) -> Items:
        """Every item of `pairs` that `share` `[P, 2, S]` gives this optimiser step, trajectory by trajectory."""
        steps = share[pairs]
        pair = pairs[:, None, None].expand_as(steps).flatten()
        branch = torch.arange(2)[None, :, None].expand_as(steps).flatten()
        return cls(pair, branch, steps.flatten())

    @classmethod
    def padding(cls) -> Items:
        """One item that is computed, since other ranks compute one, and counts for nothing."""
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(zero, zero, zero, weight=0.0)

    def __len__(self) -> int:
        return len(self.pair)

    def chunks(self, size: int) -> list[Items]:
        """Consecutive micro-batches of at most `size` items."""
        parts = zip(self.pair.split(size), self.branch.split(size), self.step.split(size), strict=True)
        return [Items(*part) for part in parts]
