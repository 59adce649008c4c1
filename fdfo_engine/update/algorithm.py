"""What tells one method from another: the rest of the engine asks nothing else of it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fdfo_engine.rollout.plan import SamplingPlan
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import Advantage
from fdfo_engine.update.items import Items
from fdfo_engine.update.objective import Objective


class Algorithm(Protocol):
    """A method of training on scored rollouts."""

    @property
    def plan(self) -> SamplingPlan:
        """How trajectories are sampled."""
        ...

    def advantage(self, rewards: Tensor, rollout: Rollout) -> Advantage:
        """Advantages of this rank's pairs, from rewards float64 `[num_pairs, 2]` of all ranks' pairs. Collective.

        NaN in either branch is no opinion on the pair.
        """
        ...

    def log_ratio(self, velocity: Tensor, rollout: Rollout, items: Items) -> Tensor:
        """Log-ratio of `velocity` `[B, C, H, W]` to the one that sampled, float32 `[B]`; differentiable in it."""
        ...

    def objective(self, values: Tensor, normalizer: int, clip_range: float) -> Objective:
        """The loss by advantages `[P, 2]` of this rank's pairs, divided by the `normalizer` items of all ranks."""
        ...
