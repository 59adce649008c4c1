"""Flow-GRPO (arXiv 2505.05470): policy gradient on the steps of a stochastic sampler.

Between two grid points the sampler draws `x' ~ N(mu, (s^2)(-dt))`, `mu = x (1 + s^2 dt / (2t)) + v (1 + s^2 (1 - t) /
(2t)) dt`. With `e = v - v_old`, `c = (1 + s^2 (1 - t) / (2t)) dt` and `std = s sqrt(-dt)`, the log-ratio of the two
normal densities at `x' = mu_old + std * eps` is `(c / std) mean(e * eps) - c^2 / (2 std^2) mean(e^2)`: METHOD's form
with `u = -(std / c) eps`, times `c^2 / (2 std^2)`. So it does not cancel either, and one op serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fdfo_engine.algorithms.clipped_ratio import ClippedRatio
from fdfo_engine.algorithms.groups import group_advantage
from fdfo_engine.config import FlowGrpoAlgorithm
from fdfo_engine.ops import churn_stream, log_ratio, moved, philox_normal
from fdfo_engine.rollout.plan import SamplingPlan
from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import Advantage
from fdfo_engine.update.items import Items


@dataclass(frozen=True)
class FlowGrpo:
    """Every image has noise of its own; each step of each is an action, with its image's advantage in its group."""

    settings: FlowGrpoAlgorithm
    backend: str

    @property
    def plan(self) -> SamplingPlan:
        """The stochastic sampler; both branches of a pair start from noise of their own."""
        return SamplingPlan("sde", partial(stochastic, self.settings.noise))

    def advantage(self, rewards: Tensor, rollout: Rollout) -> Advantage:
        """Rewards relative to their prompt's images."""
        return group_advantage(rewards, rollout, self.settings.advantage_clip)

    def log_ratio(self, velocity: Tensor, rollout: Rollout, items: Items) -> Tensor:
        """Mean over elements of the difference of the log densities at the step that was taken."""
        step = items.step
        sigmas, level = rollout.sigmas.double().cpu(), rollout.gammas[items.pair, step + 1].double()
        t, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
        shift, std = (1 + level**2 * (1 - t) / (2 * t)) * dt, level * torch.sqrt(-dt)
        eps = philox_normal(
            velocity.shape[1:], seed=rollout.seed, pair_ids=rollout.ids_of(items.pair),
            stream=churn_stream(step + 1, items.branch), device=velocity.device, backend=rollout.backend,
        )  # fmt: skip
        u = moved((-std / shift).float(), velocity.device).view(-1, 1, 1, 1) * eps
        rows = torch.arange(len(items))
        v_old = rollout.velocities_at(items.pair, items.branch, step)
        plain = log_ratio(velocity, v_old, u, pair=rows, branch=torch.zeros_like(rows), backend=self.backend)
        return moved((shift**2 / (2 * std**2)).float(), velocity.device) * plain

    def objective(self, values: Tensor, normalizer: int, clip_range: float) -> ClippedRatio:
        """The clipped ratio of log densities."""
        return ClippedRatio(values, normalizer, clip_range, self.log_ratio)


def stochastic(noise: float, sigmas: Tensor, pair_ids: Sequence[int]) -> Tensor:
    """`noise_levels` of every pair, float64 `[P, T + 1]`."""
    return noise_levels(sigmas, noise).expand(len(pair_ids), -1).clone()


def noise_levels(sigmas: Tensor, noise: float) -> Tensor:
    """`s = noise * sqrt(t / (1 - t))` of the step to each grid point, float64 `[T + 1]`; the first is the prior's 1.

    At t = 1 the next sigma stands for t under the root.

    Raises:
        UsageError: a step is so long that its noise would turn the latent around.
    """
    t = sigmas.double().cpu()
    below = torch.where(t[:-1] < 1, t[:-1], t[1:])
    levels = noise * torch.sqrt(t[:-1] / (1 - below))
    kept = 1 + levels**2 * t.diff() / (2 * t[:-1])
    if not bool((kept > 0).all()):
        step = int((kept <= 0).nonzero()[0])
        raise UsageError(
            f"algorithm.noise = {noise}: too much for step {step} of this grid, from {t[step]:.3g} to "
            f"{t[step + 1]:.3g}; lower it, or raise sampling.steps"
        )
    return torch.cat([torch.ones(1, dtype=torch.float64), levels])
