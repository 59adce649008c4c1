"""What a training step maximises: an algorithm's loss, or weights that a caller made from log-ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fdfo_engine.ops import moved
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.items import Items


class Objective(Protocol):
    """The loss of one rollout's items, this rank's part of it."""

    @property
    def normalizer(self) -> int:
        """B, the items of the optimiser step over all ranks."""
        ...

    @property
    def clip_range(self) -> float:
        """Distance of exp(log-ratio) from 1 beyond which an item counts as clipped, in the metrics at least."""
        ...

    @property
    def live(self) -> Tensor:
        """Pairs with a gradient, bool `[P]`; the others need no forward."""
        ...

    def loss(self, velocity: Tensor, rollout: Rollout, items: Items) -> tuple[Tensor, Tensor]:
        """The loss of `velocity` `[B, C, H, W]` at `items`, summed; and the log-ratio of each, `[B]`, detached."""
        ...


@dataclass(frozen=True)
class WeightedLogRatios:
    """`sum of w * l`, whatever loss the weights `dL/dl` belong to.

    Attributes:
        weights: w of every solver step, float32 `[P, 2, T]`; 0 pulls at nothing.
        normalizer, clip_range: see `Objective`; the weights are taken as they are.
        log_ratio: the algorithm's, of velocities at items of a rollout.
    """

    weights: Tensor
    normalizer: int
    clip_range: float
    log_ratio: Callable[[Tensor, Rollout, Items], Tensor]

    @property
    def live(self) -> Tensor:
        """See `Objective`."""
        return (self.weights != 0).flatten(1).any(1)

    def loss(self, velocity: Tensor, rollout: Rollout, items: Items) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        ratios = self.log_ratio(velocity, rollout, items)
        weights = moved(self.weights[items.pair, items.branch, items.step], ratios.device)
        return torch.where(weights == 0, 0.0, weights * ratios).sum(), ratios.detach()
