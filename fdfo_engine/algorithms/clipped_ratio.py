"""The clipped probability ratio of PPO and GRPO, whatever the log-ratio is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdfo_engine.ops import moved
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.items import Items


@dataclass(frozen=True)
class ClippedRatio:
    """`mean of max(-A rho, -A clip(rho, 1 - c, 1 + c))`, `rho = exp(l)`.

    Attributes:
        values: A of each branch, float32 `[P, 2]`; 0 pulls at nothing.
        normalizer, clip_range: B and c.
        log_ratio: l of velocities at items of a rollout.
    """

    values: Tensor
    normalizer: int
    clip_range: float
    log_ratio: Callable[[Tensor, Rollout, Items], Tensor]

    @property
    def live(self) -> Tensor:
        """See `Objective`."""
        return (self.values != 0).any(1)

    def loss(self, velocity: Tensor, rollout: Rollout, items: Items) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        log_ratio = self.log_ratio(velocity, rollout, items)
        advantage = moved(self.values[items.pair, items.branch], log_ratio.device)
        ratio = log_ratio.exp()
        held = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        loss = torch.maximum(-advantage * ratio, -advantage * held).sum() / self.normalizer
        return loss, log_ratio.detach()
