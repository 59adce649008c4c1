"""How the trajectories of a rollout are sampled: what an algorithm asks of the sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fdfo_engine.ops import Solver


@dataclass(frozen=True)
class SamplingPlan:
    """The fresh noise of every branch on its way.

    Attributes:
        solver: what the gammas are: METHOD's churn, or the noise level of a stochastic differential equation.
        gammas: of a grid `[T + 1]` and global pair indices, float64 `[P, T + 1]`: gamma of each pair at each grid
            point, a function of (seed, pair) and of nothing else.
    """

    solver: Solver
    gammas: Callable[[Tensor, Sequence[int]], Tensor]
