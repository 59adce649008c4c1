"""What AWM and DiffusionNFT share: groups of images, and velocities where the final latents are noised again."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fdfo_engine.algorithms.flow_grpo import stochastic
from fdfo_engine.config import Config
from fdfo_engine.config.cross_checks import trained_steps
from fdfo_engine.rollout.plan import SamplingPlan
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.deal import deal_steps
from fdfo_engine.update.items import Items


def renoised_plan(config: Config, noise: float) -> SamplingPlan:
    """Samples with `noise` of `noise_levels`, then looks again at the times that the update is going to train."""
    steps = partial(
        deal_steps, steps=config.sampling.steps, train_steps=trained_steps(config), optimizer_steps=1,
        seed=config.run.seed, subset=config.update.subset,
    )  # fmt: skip
    return SamplingPlan("sde", partial(stochastic, noise), lambda pair_ids: steps(pair_ids)[0])


def target_velocity(rollout: Rollout, items: Items) -> Tensor:
    """`eps - x_0` of each item, float32 `[B, C, H, W]`: the velocity of the line that its state lies on."""
    assert rollout.finals is not None, "the plan keeps them"
    finals = rollout.finals[items.pair, items.branch]
    noise = rollout.renoising.noise(finals, rollout.ids_of(items.pair), items.branch, items.step)
    return noise - finals
