"""FDFO with its choices made otherwise: states, direction, pairing. The first of each is FDFO, to the bit.

The other direction is AWM's: toward the image's own line, `y = (x_t - x_0) / t`, which is `eps - x_0` where the state
is a final image noised again; `u = v_old - y` in METHOD's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdfo_engine.config import AblationAlgorithm, ChurnConfig
from fdfo_engine.ops import fdfo_loss, log_ratio, moved
from fdfo_engine.rollout.churn import churn_gammas
from fdfo_engine.rollout.plan import SamplingPlan
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import Advantage, advantage
from fdfo_engine.update.items import Items

OWN_NOISE = 1e6
"""Churn of the prior that leaves a millionth of the noise that the branches share."""


@dataclass(frozen=True)
class Ablation:
    """One cell of the 2 x 2 x 2 grid."""

    settings: AblationAlgorithm
    churn: ChurnConfig
    seed: int
    steps_to_train: Callable[[Sequence[int]], Tensor]
    backend: str

    @property
    def plan(self) -> SamplingPlan:
        """Churn by its schedule, behind noise of one's own where the pair has two."""
        return SamplingPlan("churn", self._gammas, self.steps_to_train if self.settings.renoises else None)

    def _gammas(self, sigmas: Tensor, pair_ids: Sequence[int]) -> Tensor:
        gammas = churn_gammas(self.churn, sigmas, pair_ids, self.seed)
        if self.settings.pairing == "two_noises":
            gammas[:, 0] = OWN_NOISE
        return gammas

    def advantage(self, rewards: Tensor, rollout: Rollout) -> Advantage:
        """Half the difference of a pair's rewards."""
        return advantage(rewards[rollout.local_rows], rollout.direction)

    def log_ratio(self, velocity: Tensor, rollout: Rollout, items: Items) -> Tensor:
        """METHOD's l, with this direction."""
        v_old = rollout.velocities_at(items.pair, items.branch, items.step)
        u, rows = self.direction(rollout, items), torch.arange(len(items))
        return log_ratio(velocity, v_old, u, pair=rows, branch=torch.zeros_like(rows), backend=self.backend)

    def direction(self, rollout: Rollout, items: Items) -> Tensor:
        """u of each item, float32 `[B, C, H, W]`."""
        if self.settings.direction == "pair":
            sign = moved(1.0 - 2.0 * items.branch, rollout.direction.device).view(-1, 1, 1, 1)
            return sign * rollout.direction[moved(items.pair, rollout.direction.device)]
        v_old = rollout.velocities_at(items.pair, items.branch, items.step).float()
        return v_old - own_line(rollout, items)

    def objective(self, values: Tensor, normalizer: int, clip_range: float) -> DirectedSurrogate:
        """METHOD's loss, with this direction."""
        return DirectedSurrogate(values, normalizer, clip_range, self)


@dataclass(frozen=True)
class DirectedSurrogate:
    """METHOD's loss with a direction an item.

    Attributes:
        values: A of each branch, float32 `[P, 2]`; 0 pulls at nothing.
        normalizer, clip_range: B and c.
    """

    values: Tensor
    normalizer: int
    clip_range: float
    algorithm: Ablation

    @property
    def live(self) -> Tensor:
        """See `Objective`."""
        return (self.values != 0).any(1)

    def loss(self, velocity: Tensor, rollout: Rollout, items: Items) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        rows = torch.arange(len(items))
        return fdfo_loss(
            velocity,
            rollout.velocities_at(items.pair, items.branch, items.step),
            self.algorithm.direction(rollout, items),
            moved(self.values[items.pair, items.branch], velocity.device),
            clip_range=self.clip_range,
            pair=rows,
            branch=torch.zeros_like(rows),
            normalizer=float(self.normalizer),
            backend=self.algorithm.backend,
        )


def own_line(rollout: Rollout, items: Items) -> Tensor:
    """`(x_t - x_0) / t` of each item, float32 `[B, C, H, W]`: the velocity of the line from its image to its state."""
    last = torch.full_like(items.step, rollout.steps)
    if rollout.finals is None:
        finals = rollout.latents(items.pair, items.branch, last)
    else:
        finals = rollout.finals_at(items.pair, items.branch)
    states = rollout.latents(items.pair, items.branch, items.step)
    t = moved(rollout.sigmas[items.step], states.device).view(-1, 1, 1, 1)
    return (states - finals) / t
