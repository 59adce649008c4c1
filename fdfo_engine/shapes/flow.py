"""Second stage of pretraining: flow matching of transformer and text encoders on cached latents."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fdfo_engine.shapes.autoencoder import encode_pictures
from fdfo_engine.shapes.pipeline import PROMPT_TOKENS, encode_tokens
from fdfo_engine.shapes.render import render
from fdfo_engine.shapes.scene import captions


@dataclass(frozen=True)
class FlowSettings:
    """How the flow model is trained; the defaults made the shipped base."""

    steps: int = 10_000
    batch: int = 32
    pictures: int = 40_000
    learning_rate: float = 3e-3
    decay: bool = True
    """Warm up first and let the rate fall to zero over the last 30 %; False keeps it constant, for further training."""
    ema: float = 0.998
    weight_decay: float = 0.01
    empty_share: float = 0.1
    """Share of captions replaced by the empty prompt, which guidance needs."""


@dataclass(frozen=True)
class Cache:
    """Raw latents [N, C, H, W] and token ids [N, S] of a fixed set of training pictures."""

    latents: Tensor
    tokens: Tensor


def build_cache(pipe: Any, count: int, seed: int) -> Cache:
    """Draws `count` training captions, renders each once and encodes it."""
    rng = np.random.default_rng((seed, 2))
    texts = captions("train", count, seed + 1)
    parts = []
    for start in range(0, count, 256):
        pictures = np.stack([render(text, rng) for text in texts[start : start + 256]])
        parts.append(encode_pictures(pipe, torch.from_numpy(pictures)))
    return Cache(torch.cat(parts), tokenise(pipe, texts))


def tokenise(pipe: Any, texts: list[str]) -> Tensor:
    """Returns the token ids [N, S] of captions, padded as the pipeline pads them."""
    options = {"padding": "max_length", "max_length": PROMPT_TOKENS, "truncation": True, "return_tensors": "pt"}
    ids: Tensor = pipe.tokenizer(texts, **options).input_ids
    return ids


def train_flow(pipe: Any, cache: Cache, settings: FlowSettings, seed: int, log: Callable[[int, float], None]) -> None:
    """Trains transformer and text encoders in place; between steps and at the end `pipe` holds averaged weights.

    `log` is told each step and its loss, and may sample from the pipeline. The result repeats for equal arguments and
    thread counts.
    """
    model = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    average = _Average(model, settings.ema)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    empty = tokenise(pipe, [""])
    for step, rows in enumerate(_batches(len(cache.tokens), settings, generator)):
        if settings.decay:
            optimiser.param_groups[0]["lr"] = settings.learning_rate * _rate(step, settings.steps)
        drop = torch.rand(len(rows), 1, generator=generator) < settings.empty_share
        tokens = torch.where(drop, empty, cache.tokens[rows])
        loss = _loss(pipe, cache.latents[rows], tokens, generator)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update(step)
        with average.swapped():
            log(step + 1, loss.item())
    average.swap()
    model.eval()


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: 200 steps up, then level, then a line to zero."""
    return min((step + 1) / 200, 1.0, (steps - step) / (0.3 * steps))


class _Average:
    """Exponential average of a model's parameters, which can trade places with them."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.live: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.mean = [parameter.detach().clone() for parameter in self.live]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        for live, mean in zip(self.live, self.mean, strict=True):
            held = live.clone()
            live.copy_(mean)
            mean.copy_(held)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        self.swap()
        yield
        self.swap()


def _batches(count: int, settings: FlowSettings, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=generator)
    for _ in range(settings.steps):
        if len(order) < settings.batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        rows, order = order[: settings.batch], order[settings.batch :]
        yield rows


def _loss(pipe: Any, raw: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity noise - data, at logit-normal times shifted as the scheduler shifts them."""
    data = (raw - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    noise = torch.randn(data.shape, generator=generator)
    time = torch.sigmoid(torch.randn(len(data), generator=generator))
    shift = pipe.scheduler.config.shift
    time = shift * time / (1 + (shift - 1) * time)
    mixed = torch.lerp(data, noise, time[:, None, None, None])
    hidden, pooled = encode_tokens(pipe, tokens)
    velocity = pipe.transformer(mixed, hidden, pooled, 1000 * time, return_dict=False)[0]
    return nn.functional.mse_loss(velocity, noise - data)
