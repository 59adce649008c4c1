"""Rewards of the shapes world: does the picture show what its caption says? A program that looks at pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fdfo_engine.rewards.registry import register
from fdfo_engine.shapes.judge import judge


@register("shapes")
def shapes(prompts: Sequence[str], images: Tensor) -> Tensor:
    """Share of the caption's facts that the picture shows, 0..1 `[N]`; see `fdfo_engine.shapes.judge`."""
    pixels = images.float().cpu().numpy()
    return torch.tensor([judge(p, image).score for p, image in zip(prompts, pixels, strict=True)])


@register("shapes_strict")
def shapes_strict(prompts: Sequence[str], images: Tensor) -> Tensor:
    """1 where every fact of the caption holds, else 0; `[N]`."""
    pixels = images.float().cpu().numpy()
    return torch.tensor([float(judge(p, image).strict) for p, image in zip(prompts, pixels, strict=True)])
