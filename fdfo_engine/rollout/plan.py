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
        renoised_steps: of global pair indices, int64 `[P, 2, S]`: the steps at whose times the model looks at final
            latents, noised again, after sampling; None keeps the velocities of the trajectories.
    """

    solver: Solver
    gammas: Callable[[Tensor, Sequence[int]], Tensor]
    renoised_steps: Callable[[Sequence[int]], Tensor] | None = None
