"""What AWM and DiffusionNFT share: groups of images, and velocities where the final latents are noised again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fdfo_engine.algorithms.flow_grpo import stochastic
from fdfo_engine.algorithms.groups import group_advantage
from fdfo_engine.config import AwmAlgorithm, Config, NftAlgorithm
from fdfo_engine.config.cross_checks import trained_steps
from fdfo_engine.ops import log_ratio
from fdfo_engine.rollout.plan import SamplingPlan
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import Advantage
from fdfo_engine.update.deal import deal_steps
from fdfo_engine.update.items import Items


@dataclass(frozen=True)
class RenoisedImages:
    """An algorithm but for its objective.

    With `lp = -mean((v - y)^2)`, `y = eps - x_0`, at the same eps and t for the new velocity and the old, and
    `e = v - v_old`: `lp - lp_old = -(mean(e^2) + 2 mean(e (v_old - y)))`, METHOD's log-ratio with `u = v_old - y`.
    """

    settings: AwmAlgorithm | NftAlgorithm
    plan: SamplingPlan
    backend: str

    def advantage(self, rewards: Tensor, rollout: Rollout) -> Advantage:
        """Rewards relative to their prompt's images."""
        return group_advantage(rewards, rollout, self.settings.advantage_clip)

    def log_ratio(self, velocity: Tensor, rollout: Rollout, items: Items) -> Tensor:
        """Difference of the likelihood bounds lp, new and old, in squared latent units, without its cancellation."""
        v_old = rollout.velocities_at(items.pair, items.branch, items.step)
        u, rows = v_old.float() - target_velocity(rollout, items), torch.arange(len(items))
        return log_ratio(velocity, v_old, u, pair=rows, branch=torch.zeros_like(rows), backend=self.backend)


def renoised_plan(config: Config, noise: float) -> SamplingPlan:
    """Samples with `noise` of `noise_levels`, then looks again at the times that the update is going to train."""
    return SamplingPlan("sde", partial(stochastic, noise), steps_to_train(config))


def steps_to_train(config: Config) -> Callable[[Sequence[int]], Tensor]:
    """Of global pairs the steps that an update trains, int64 `[P, 2, S]`."""
    steps = partial(
        deal_steps, steps=config.sampling.steps, train_steps=trained_steps(config), optimizer_steps=1,
        seed=config.run.seed, subset=config.update.subset,
    )  # fmt: skip
    return lambda pair_ids: steps(pair_ids)[0]


def target_velocity(rollout: Rollout, items: Items) -> Tensor:
    """`eps - x_0` of each item, float32 `[B, C, H, W]`: the velocity of the line that its state lies on."""
    finals = rollout.finals_at(items.pair, items.branch)
    noise = rollout.renoising.noise(finals, rollout.ids_of(items.pair), items.branch, items.step)
    return noise - finals
