"""Diversity by what a network sees: CLIP's image embedding through transformers, and DreamSim through its package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fdfo_engine.metrics.diversity import DiversityMeasure, embedding_diversity
from fdfo_engine.runtime.errors import EnvironmentProblem

DEFAULT_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP (Radford et al. 2021); LAION's models were trained with the same."""

_BATCH = 64
_DREAMSIM_SIDE = 224


class ClipEmbedder:
    """`embed(images [N, 3, H, W] in 0..1) -> [N, E]`: the projected image embedding of a CLIP model, not normalised.

    As its processor does it: the shorter side is resized to the model's size (bicubic), the middle cut out, colours
    normalised; in float32.
    """

    def __init__(self, model_id: str, device: torch.device, *, allow_download: bool = False) -> None:
        """Loads the model `model_id`, a folder or a hub id.

        Raises:
            EnvironmentProblem: it is not on this machine and may not be fetched, or it is no CLIP model.
        """
        from transformers import CLIPVisionModelWithProjection

        try:
            model = CLIPVisionModelWithProjection.from_pretrained(
                model_id, dtype=torch.float32, local_files_only=not allow_download
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise EnvironmentProblem(
                f"clip_diversity: the CLIP model {model_id!r} is not on this machine ({reason}); "
                "name a folder with --clip, or let it be fetched from the hub with --allow-download"
            ) from error
        self._model = model.eval().requires_grad_(False).to(device)
        self._side = int(model.config.image_size)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """See the class."""
        parts = [self._model(pixel_values=self.pixels(part)).image_embeds for part in images.split(_BATCH)]
        return torch.cat(parts).float().cpu()

    def pixels(self, images: Tensor) -> Tensor:
        """What the network is shown: `[N, 3, side, side]`, normalised, on its device."""
        images = images.to(self._device, torch.float32)
        shorter = min(images.shape[-2:])
        size = [self._side * n // shorter for n in images.shape[-2:]]
        if size != list(images.shape[-2:]):
            images = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((n - self._side) // 2 for n in size)
        images = images[..., top : top + self._side, left : left + self._side]
        mean, std = (images.new_tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        return (images - mean) / std


def clip_diversity(model_id: str, device: torch.device, *, allow_download: bool = False) -> DiversityMeasure:
    """1 - cosine of CLIP image embeddings, mean over pairs; see `ClipEmbedder`."""
    embed = ClipEmbedder(model_id, device, allow_download=allow_download)
    return lambda images: embedding_diversity(images, embed)


def dreamsim_diversity(device: torch.device, *, allow_download: bool = False) -> DiversityMeasure:
    """DreamSim distance (Fu et al. 2023, arXiv 2306.09344), mean over pairs. Its package fetches weights by itself.

    Raises:
        EnvironmentProblem: the package is absent or cannot be loaded, or a download was not allowed.
    """
    if not allow_download:
        raise EnvironmentProblem(
            "dreamsim_diversity: the package dreamsim fetches its weights (about 1 GB) when they are not in its cache; "
            "allow it with --allow-download"
        )
    try:
        from dreamsim import dreamsim
    except ImportError as error:
        raise EnvironmentProblem(
            f'dreamsim_diversity: {error}; pip install "fdfo-engine[dreamsim]" (it needs torchvision)'
        ) from error
    model, _ = dreamsim(pretrained=True, device=str(device))
    return lambda images: embedding_diversity(images, lambda flat: _dreamsim_embeddings(flat, model, device))


@torch.no_grad()
def _dreamsim_embeddings(images: Tensor, model: Any, device: torch.device) -> Tensor:
    """As its own preprocessing does it: a square of 224 pixels, bicubic; it normalises colours itself."""
    size = (_DREAMSIM_SIDE, _DREAMSIM_SIDE)
    parts = (part.to(device, torch.float32) for part in images.split(_BATCH))
    resized = (functional.interpolate(part, size, mode="bicubic", antialias=True).clamp(0, 1) for part in parts)
    return torch.cat([model.embed(part).reshape(len(part), -1) for part in resized])
