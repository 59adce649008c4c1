"""Pictures drawn by formula, the same on every machine: what a reward is tried on where there is no model."""

from __future__ import annotations

import torch
from torch import Tensor

CIRCLE_PROMPT = "a red circle"


def circle_and_noise(side: int = 256) -> Tensor:
    """`[2, 3, side, side]` in 0..1: a red circle on white, and noise."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    outside = (x.square() + y.square()).sqrt().sub(0.5).mul(side / 2).clamp(0, 1)  # one pixel of soft edge
    red = torch.tensor([0.85, 0.1, 0.1]).view(3, 1, 1)
    circle = red + (1 - red) * outside
    noise = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    return torch.stack([circle, noise])
