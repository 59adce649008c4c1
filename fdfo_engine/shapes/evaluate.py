"""Samples a pipeline without churn or guidance and lets the judge score it: how good is this base?"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdfo_engine.shapes.judge import judge
from fdfo_engine.shapes.pipeline import encode_captions

_BATCH = 64


@dataclass(frozen=True)
class Quality:
    """Mean score of the judge and share of captions with every fact right, both 0..1."""

    score: float
    strict: float


def evaluate(pipe: Any, texts: Sequence[str], steps: int, seed: int = 0) -> Quality:
    """Judges one image a caption, sampled with `steps` Euler steps from noise drawn by `seed`."""
    pictures = sample_pictures(pipe, texts, steps, seed).numpy()
    verdicts = [judge(text, picture) for text, picture in zip(texts, pictures, strict=True)]
    return Quality(
        score=float(np.mean([verdict.score for verdict in verdicts])),
        strict=float(np.mean([verdict.strict for verdict in verdicts])),
    )


def sample_pictures(pipe: Any, texts: Sequence[str], steps: int, seed: int = 0) -> Tensor:
    """Returns one picture a caption, [N, 3, H, W] in 0..1."""
    config = pipe.transformer.config
    shape = (len(texts), config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    parts = range(0, len(texts), _BATCH)
    return torch.cat([_sample(pipe, texts[i : i + _BATCH], noise[i : i + _BATCH], steps) for i in parts])


@torch.no_grad()
def _sample(pipe: Any, texts: Sequence[str], latents: Tensor, steps: int) -> Tensor:
    hidden, pooled = encode_captions(pipe, texts)
    pipe.scheduler.set_timesteps(steps)
    sigmas = pipe.scheduler.sigmas.tolist()
    for now, then in pairwise(sigmas):
        time = torch.full((len(latents),), 1000 * now)
        velocity = pipe.transformer(latents, hidden, pooled, time, return_dict=False)[0]
        latents = latents + (then - now) * velocity
    vae = pipe.vae
    decoded: Tensor = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    return (decoded / 2 + 0.5).clamp(0, 1)
