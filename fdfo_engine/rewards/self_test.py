"""Does a reward see? Two drawn images of which anyone would prefer the first."""

from __future__ import annotations

import torch
from torch import Tensor

from fdfo_engine.rewards.registry import Reward
from fdfo_engine.runtime.errors import RewardError

PROMPT = "a red circle"


def self_test_images(side: int = 256) -> Tensor:
    """`[2, 3, side, side]` in 0..1: a red circle on white, and noise."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    outside = (x.square() + y.square()).sqrt().sub(0.5).mul(side / 2).clamp(0, 1)  # one pixel of soft edge
    red = torch.tensor([0.85, 0.1, 0.1]).view(3, 1, 1)
    circle = red + (1 - red) * outside
    noise = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    return torch.stack([circle, noise])


def self_test(reward: Reward, side: int = 256) -> tuple[float, float]:
    """Scores of two images of which anyone would prefer the first: for "a red circle" a circle, and noise.

    A reward that such images tell nothing has a `self_test_case(side)` of its own: a prompt, and two images.

    Raises:
        RewardError: a score is missing, or the second is not liked less.
    """
    own = getattr(reward, "self_test_case", None)
    prompt, images = own(side) if own else (PROMPT, self_test_images(side))
    scores = torch.as_tensor(reward([prompt, prompt], images))
    if scores.shape != (2,) or not torch.isfinite(scores).all():
        raise RewardError(f"self-test: takes two numbers, got {scores.tolist()}")
    good, bad = scores.tolist()
    if good <= bad:
        raise RewardError(f"self-test: {prompt} scores {good:g} where it is drawn and {bad:g} for the other image")
    return good, bad
