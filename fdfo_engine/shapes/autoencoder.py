"""First stage of pretraining: the autoencoder, on freshly drawn pictures."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fdfo_engine.shapes.render import render
from fdfo_engine.shapes.scene import captions

_FIRST_LOG_VARIANCE = -5.0


@dataclass(frozen=True)
class AutoencoderSettings:
    """How the autoencoder is trained; the defaults made the shipped base."""

    steps: int = 2500
    batch: int = 16
    learning_rate: float = 3e-3
    kl_weight: float = 1e-5
    square_weight: float = 2.0
    """Weight of the squared error beside the absolute one: it makes small objects appear early."""


def train_autoencoder(pipe: Any, settings: AutoencoderSettings, seed: int, log: Callable[[int, float], None]) -> None:
    """Trains `pipe.vae` in place: absolute and squared error of the pixels, and a light KL term.

    `log` is told each step and its loss. The result repeats for equal arguments and thread counts.
    """
    vae = pipe.vae.train()
    with torch.no_grad():  # fresh posteriors are as wide as their means: start narrow, or the latents are only noise
        vae.encoder.conv_out.bias[vae.config.latent_channels :] = _FIRST_LOG_VARIANCE
    optimiser = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    pictures = _pictures(settings, seed)
    for step in range(settings.steps):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * warm_cosine(step, settings.steps, warmup=50)
        loss = _loss(vae, next(pictures), settings, generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        log(step + 1, loss.item())
    vae.eval().requires_grad_(False)


def set_latent_scale(pipe: Any, latents: Tensor) -> None:
    """Writes the mean and spread of raw latents into the autoencoder's config, as SD3's own has them."""
    pipe.vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))


def encode_pictures(pipe: Any, pictures: Tensor) -> Tensor:
    """Returns the raw latents [N, C, H, W] of pictures [N, 3, H, W] in 0..1, before scale and shift."""
    with torch.no_grad():
        parts = [pipe.vae.encode(part * 2 - 1).latent_dist.mode() for part in pictures.split(64)]
    return torch.cat(parts)


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Returns the share of the peak learning rate at a step: linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _pictures(settings: AutoencoderSettings, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng((seed, 1))
    texts = captions("train", settings.steps * settings.batch, seed)
    for start in range(0, len(texts), settings.batch):
        yield torch.from_numpy(np.stack([render(text, rng) for text in texts[start : start + settings.batch]]))


def _loss(vae: Any, pictures: Tensor, settings: AutoencoderSettings, generator: torch.Generator) -> Tensor:
    target = pictures * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        restored = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
    absolute, square = functional.l1_loss(restored, target), functional.mse_loss(restored, target)
    loss: Tensor = absolute + settings.square_weight * square + settings.kl_weight * divergence
    return loss
