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

    steps: int = 1200
    batch: int = 16
    learning_rate: float = 3e-3
    kl_weight: float = 1e-5
    square_weight: float = 2.0
    """Weight of the squared error beside the absolute one: it makes small objects appear early."""
    decoder_share: float = 0.6
    """Further steps, as a share of `steps`, of the decoder alone, on noisy latents: a flow model's are never exact."""
    decoder_noise: float = 0.2
    """Largest noise of those latents, in units of their spread."""

    @property
    def decoder_steps(self) -> int:
        """Steps of the decoder alone."""
        return round(self.decoder_share * self.steps)


def train_autoencoder(pipe: Any, settings: AutoencoderSettings, seed: int, log: Callable[[int, float], None]) -> None:
    """Trains `pipe.vae` in place: absolute and squared error of the pixels, and a light KL term.

    `log` is told each step and its loss. The result repeats for equal arguments and thread counts.
    """
    vae = pipe.vae.train()
    with torch.no_grad():  # fresh posteriors are as wide as their means: start narrow, or the latents are only noise
        vae.encoder.conv_out.bias[vae.config.latent_channels :] = _FIRST_LOG_VARIANCE
    pictures = _pictures(settings.steps, settings.batch, (seed, 1), seed)
    _descend(vae, settings, settings.steps, seed, pictures, _whole_loss, log)


def train_decoder(pipe: Any, settings: AutoencoderSettings, seed: int, log: Callable[[int, float], None]) -> None:
    """Trains the decoder of `pipe.vae` further in place, on noisy latents; the encoder and its latents stay."""
    vae = pipe.vae
    vae.decoder.train().requires_grad_(True)
    pictures = _pictures(settings.decoder_steps, settings.batch, (seed, 3), seed + 2)
    _descend(vae, settings, settings.decoder_steps, seed, pictures, _decoder_loss, log)


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


def _pictures(steps: int, batch: int, stream: tuple[int, int], caption_seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(stream)
    texts = captions("train", steps * batch, caption_seed)
    for start in range(0, len(texts), batch):
        yield torch.from_numpy(np.stack([render(text, rng) for text in texts[start : start + batch]]))


_Loss = Callable[[Any, Tensor, AutoencoderSettings, torch.Generator], Tensor]


def _descend(
    vae: Any,
    settings: AutoencoderSettings,
    steps: int,
    seed: int,
    pictures: Iterator[Tensor],
    loss_of: _Loss,
    log: Callable[[int, float], None],
) -> None:
    vae.to(memory_format=torch.channels_last)  # a third faster on a CPU; bfloat16 would be slower without AMX
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step, batch in enumerate(pictures):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * warm_cosine(step, steps, warmup=50)
        loss = loss_of(vae, batch * 2 - 1, settings, generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        log(step + 1, loss.item())
    vae.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def _whole_loss(vae: Any, target: Tensor, settings: AutoencoderSettings, generator: torch.Generator) -> Tensor:
    posterior = vae.encode(target).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    restored = vae.decode(posterior.mean + posterior.std * noise).sample
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    loss: Tensor = _error(restored, target, settings) + settings.kl_weight * divergence
    return loss


def _decoder_loss(vae: Any, target: Tensor, settings: AutoencoderSettings, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        latents = vae.encode(target).latent_dist.mode()
    amount = settings.decoder_noise * latents.std() * torch.rand(len(latents), 1, 1, 1, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    restored = vae.decode(latents + amount * noise).sample
    return _error(restored, target, settings)


def _error(restored: Tensor, target: Tensor, settings: AutoencoderSettings) -> Tensor:
    absolute, square = functional.l1_loss(restored, target), functional.mse_loss(restored, target)
    return absolute + settings.square_weight * square
