"""Advantage Weighted Matching (arXiv 2509.25050): a policy gradient on the likelihood bound of the final image.

`lp = -mean((v - y)^2)` with `y = eps - x_0`, at the final latent noised again; the same eps and t for the new velocity
and the old. With `e = v - v_old`, `lp - lp_old = -(mean(e^2) + 2 mean(e (v_old - y)))`: METHOD's log-ratio with
`u = v_old - y`. The weight of all times is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdfo_engine.algorithms.clipped_ratio import ClippedRatio
from fdfo_engine.algorithms.groups import group_advantage
from fdfo_engine.algorithms.renoised_images import target_velocity
from fdfo_engine.config import AwmAlgorithm
from fdfo_engine.ops import log_ratio
from fdfo_engine.rollout.plan import SamplingPlan
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import Advantage
from fdfo_engine.update.items import Items


@dataclass(frozen=True)
class Awm:
    """Every image is drawn toward, or away from, by its advantage in its group."""

    settings: AwmAlgorithm
    plan: SamplingPlan
    backend: str

    def advantage(self, rewards: Tensor, rollout: Rollout) -> Advantage:
        """Rewards relative to their prompt's images."""
        return group_advantage(rewards, rollout, self.settings.advantage_clip)

    def log_ratio(self, velocity: Tensor, rollout: Rollout, items: Items) -> Tensor:
        """Difference of the bounds, new and old, in squared latent units."""
        return bound_ratio(velocity, rollout, items, self.backend)

    def objective(self, values: Tensor, normalizer: int, clip_range: float) -> ClippedRatio:
        """The clipped ratio of the bounds."""
        return ClippedRatio(values, normalizer, clip_range, self.log_ratio)


def bound_ratio(velocity: Tensor, rollout: Rollout, items: Items, backend: str) -> Tensor:
    """`mean((v_old - y)^2) - mean((v - y)^2)` of each item, float32 `[B]`, without its cancellation."""
    v_old = rollout.velocities[items.pair, items.branch, items.step]
    u, rows = v_old.float() - target_velocity(rollout, items), torch.arange(len(items))
    return log_ratio(velocity, v_old, u, pair=rows, branch=torch.zeros_like(rows), backend=backend)
