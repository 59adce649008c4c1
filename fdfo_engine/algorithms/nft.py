"""DiffusionNFT (arXiv 2509.16117): each image as a positive example and as a negative one, weighed by its reward.

With b = `algorithm.reach`, the paper's beta:
`v+ = b v + (1 - b) v_old`, `v- = (1 + b) v_old - b v`, `x0+- = x_t - t v+-` at the final latent x0 noised again;
`r = clip(A / 5, -1, 1) / 2 + 1/2`; `L = 5 mean[r |x0+ - x0|^2 / w+ + (1 - r) |x0- - x0|^2 / w-] / b`, `w+- = mean |x0+-
- x0|`, detached. As `x0+- - x0 = -t (v+- - y)` with `y = eps - x_0`, x_t is not needed. The old policy is the one that
sampled; the paper's slow average of it, whose decay grows by 0.001 an epoch, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdfo_engine.algorithms.renoised_images import RenoisedImages, target_velocity
from fdfo_engine.config import NftAlgorithm
from fdfo_engine.ops import moved
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.items import Items


@dataclass(frozen=True)
class Nft(RenoisedImages):
    """Every image counts, also one whose reward is its group's mean.

    Its loss has no log-ratio; that of `RenoisedImages` tells how far the policy has moved.
    """

    settings: NftAlgorithm

    def objective(self, values: Tensor, normalizer: int, clip_range: float) -> Contrast:
        """The two weighted distances."""
        return Contrast(values, normalizer, clip_range, self)


@dataclass(frozen=True)
class Contrast:
    """The loss of one rollout's items.

    Attributes:
        values: A of each branch, float32 `[P, 2]`. normalizer: B.
        clip_range: of the metrics alone.
    """

    values: Tensor
    normalizer: int
    clip_range: float
    algorithm: Nft

    @property
    def live(self) -> Tensor:
        """See `Objective`. A pair of no opinion has A = 0 and weighs like one that ties with its group."""
        return torch.ones(len(self.values), dtype=torch.bool)

    def loss(self, velocity: Tensor, rollout: Rollout, items: Items) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        settings, device = self.algorithm.settings, velocity.device
        v_old = rollout.velocities_at(items.pair, items.branch, items.step).float()
        target, t = target_velocity(rollout, items), moved(rollout.sigmas[items.step], device)
        step = settings.reach * (velocity.float() - v_old)
        advantage = moved(self.values[items.pair, items.branch], device)
        share = (advantage / settings.advantage_clip).clamp(-1, 1) / 2 + 0.5
        toward = _weighted_distance(v_old + step - target)
        away = _weighted_distance(v_old - step - target)
        loss = settings.advantage_clip / settings.reach * t * (share * toward + (1 - share) * away)
        with torch.no_grad():
            ratios = self.algorithm.log_ratio(velocity, rollout, items)
        return loss.sum() / self.normalizer, ratios


def _weighted_distance(difference: Tensor) -> Tensor:
    """`mean(d^2) / mean |d|` of each row, the divisor detached, `[B]`."""
    flat = difference.flatten(1)
    return flat.square().mean(1) / flat.detach().abs().mean(1).clamp_min(1e-5)
