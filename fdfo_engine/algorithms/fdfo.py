"""Finite Difference Flow Optimization: METHOD is its specification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdfo_engine.config import ChurnConfig, FdfoAlgorithm
from fdfo_engine.ops import IMPORTANCE_STREAM, fdfo_loss, log_ratio, moved, philox_words
from fdfo_engine.rollout.churn import churn_gammas
from fdfo_engine.rollout.plan import SamplingPlan
from fdfo_engine.runtime.distributed import all_gather_rows
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import Advantage, advantage
from fdfo_engine.update.items import Items


@dataclass(frozen=True)
class Fdfo:
    """Pairs of one initial noise; every step of both branches is pulled toward the better image."""

    settings: FdfoAlgorithm
    churn: ChurnConfig
    seed: int
    backend: str

    @property
    def plan(self) -> SamplingPlan:
        """Churn by its schedule."""
        return SamplingPlan("churn" if self.settings.branch_noise == "independent" else "antithetic", self._gammas)

    def _gammas(self, sigmas: Tensor, pair_ids: Sequence[int]) -> Tensor:
        return churn_gammas(self.churn, sigmas, pair_ids, self.seed)

    def advantage(self, rewards: Tensor, rollout: Rollout) -> Advantage:
        """Half the difference of a pair's rewards, after what the settings make of it."""
        if self.settings.keep_share < 1:
            rewards = without_small_differences(rewards, self.settings.keep_share)
        if self.settings.advantage_scale == "spread":
            rewards = rewards / difference_spread(rewards)
        found = advantage(rewards[rollout.local_rows], rollout.direction)
        if self.settings.importance_share == 1:
            return found
        chances = training_chances(all_gather_rows(gradient_sizes(found, rollout)), self.settings.importance_share)
        return drawn(found, chances[rollout.local_rows], rollout, self.seed)

    def log_ratio(self, velocity: Tensor, rollout: Rollout, items: Items) -> Tensor:
        """METHOD's l."""
        pair, branch = items.pair, items.branch
        v_old = rollout.velocities_at(pair, branch, items.step)
        return log_ratio(velocity, v_old, rollout.direction, pair=pair, branch=branch, backend=self.backend)

    def objective(self, values: Tensor, normalizer: int, clip_range: float) -> ClippedSurrogate:
        """METHOD's loss."""
        return ClippedSurrogate(values, normalizer, clip_range, self.backend)


def without_small_differences(rewards: Tensor, share: float) -> Tensor:
    """`rewards` `[N, 2]` with all but the `share` of pairs whose rewards differ most turned into ties."""
    difference = (rewards[:, 0] - rewards[:, 1]).abs()
    known = difference[torch.isfinite(difference)]
    kept = max(1, round(share * len(known)))
    if kept >= len(known):
        return rewards
    least = known.sort(descending=True).values[kept - 1]
    return torch.where((difference < least)[:, None], 0.0, rewards)


def gradient_sizes(found: Advantage, rollout: Rollout) -> Tensor:
    """How hard each of this rank's pairs pulls, `|A| * rms(u)`, float64 `[P]`."""
    direction = rollout.direction.double().flatten(1).square().mean(1).sqrt()
    return found.values[:, 0].abs().double() * direction.to(found.values.device)


def training_chances(sizes: Tensor, share: float) -> Tensor:
    """`min(1, c * size)` of `sizes` float64 `[N]`, with c such that they sum to `share` of the sizes above 0.

    Chances in proportion to a gradient's size leave the sum of size / chance with the least variance.
    """
    chances = torch.zeros_like(sizes)
    left, wanted = sizes > 0, share * float((sizes > 0).sum())
    while wanted > 0 and bool(left.any()):
        chances[left] = wanted * sizes[left] / sizes[left].sum()
        certain = left & (chances >= 1)
        if not bool(certain.any()):
            break
        chances[certain] = 1.0
        left, wanted = left & ~certain, wanted - float(certain.sum())
    return chances


def drawn(found: Advantage, chances: Tensor, rollout: Rollout, seed: int) -> Advantage:
    """`found` with A / chance for the pairs that are drawn and 0 for the others: its mean over draws is `found`."""
    words = philox_words(0, IMPORTANCE_STREAM, rollout.pair_ids, seed=seed)
    is_drawn = (words.double() + 0.5) * 2**-32 < chances
    factor = torch.where(is_drawn, 1 / chances.clamp_min(1e-30), 0.0)
    return replace(found, values=(found.values.double() * factor[:, None]).float())


def difference_spread(rewards: Tensor) -> float:
    """Root mean square of half the differences of `rewards` `[N, 2]`; 1 where all pairs tie."""
    half = (rewards[:, 0] - rewards[:, 1]) / 2
    spread = float(half[torch.isfinite(half)].square().mean().sqrt())
    return spread if spread > 0 else 1.0


@dataclass(frozen=True)
class ClippedSurrogate:
    """METHOD's loss.

    Attributes:
        values: A of each branch, float32 `[P, 2]`; 0 pulls at nothing.
        normalizer, clip_range: B and c.
        backend: that runs the op.
    """

    values: Tensor
    normalizer: int
    clip_range: float
    backend: str

    @property
    def live(self) -> Tensor:
        """See `Objective`."""
        return (self.values != 0).any(1)

    def loss(self, velocity: Tensor, rollout: Rollout, items: Items) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        pair, branch = items.pair, items.branch
        return fdfo_loss(
            velocity,
            rollout.velocities_at(pair, branch, items.step),
            rollout.direction,
            moved(self.values[pair, branch], velocity.device),
            clip_range=self.clip_range,
            pair=pair,
            branch=branch,
            normalizer=float(self.normalizer),
            backend=self.backend,
        )
