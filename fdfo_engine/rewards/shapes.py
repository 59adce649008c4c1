"""Rewards of the shapes world: does the picture show what its caption says? A program that looks at pixels."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.rewards.registry import register
from fdfo_engine.shapes.judge import judge


@register("shapes")
def shapes(prompts: Sequence[str], images: Tensor) -> Tensor:
    """Share of the caption's facts that the picture shows, 0..1 `[N]`; see `fdfo_engine.shapes.judge`."""
    return _judged(prompts, images, lambda verdict: float(verdict.score))


@register("shapes_strict")
def shapes_strict(prompts: Sequence[str], images: Tensor) -> Tensor:
    """1 where every fact of the caption holds, else 0; `[N]`."""
    return _judged(prompts, images, lambda verdict: float(verdict.strict))


def _judged(prompts: Sequence[str], images: Tensor, score: Callable[[Any], float]) -> Tensor:
    """NaN, no opinion, on an image that is not finite."""
    pixels = images.float().cpu()
    known = torch.isfinite(pixels).flatten(1).all(1).tolist()
    scores = zip(prompts, pixels.numpy(), known, strict=True)
    return torch.tensor([score(judge(prompt, image)) if ok else math.nan for prompt, image, ok in scores])
