"""Within-prompt diversity: how far apart the images of one prompt are, over several seeds. Higher is more diverse.

Each measure gives float32 `[P]` on the CPU for images `[P, K, 3, H, W]` in 0..1, K >= 2: the mean over the
K(K-1)/2 pairs of a distance. A run that forgets how to vary (mode collapse) lowers all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fdfo_engine.metrics.health import luma

DiversityMeasure = Callable[[Tensor], Tensor]

_PIXEL_SIDE = 64
_CELLS, _ORIENTATIONS = 8, 8


def pixel_diversity(images: Tensor) -> Tensor:
    """Rms difference of the pixels, after averaging down to at most 64 a side; 0 for equal images, 1 black to white."""
    features = _flat(images, _small)
    return mean_pairwise(features, lambda a, b: (a - b).square().mean(-1).sqrt())


def structure_diversity(images: Tensor) -> Tensor:
    """1 - cosine of histograms of gradient orientation: where edges are and how they run, whatever the colours.

    8 x 8 cells of 8 unsigned orientations, each gradient weighted by its length, as in Dalal and Triggs (2005) without
    their blocks. Two images without any edge are equal.
    """
    return embedding_diversity(images, _orientations)


def embedding_diversity(images: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """1 - cosine of `embed(images [N, 3, H, W]) -> [N, E]`."""
    return mean_pairwise(functional.normalize(_flat(images, embed), dim=-1), lambda a, b: (a - b).square().sum(-1) / 2)


def mean_pairwise(features_PKE: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean over the pairs of K of `distance(a, b)` of rows `[P, pairs, E]`; float32 `[P]`, NaN where one is not.

    Raises:
        ValueError: K is less than 2.
    """
    count = features_PKE.shape[1]
    if count < 2:
        raise ValueError(f"images: {count} a prompt; diversity takes 2 or more")
    one, other = torch.triu_indices(count, count, offset=1, device=features_PKE.device)
    return distance(features_PKE[:, one], features_PKE[:, other]).mean(1).float().cpu()


DIVERSITY: dict[str, DiversityMeasure] = {
    "pixel_diversity": pixel_diversity,
    "structure_diversity": structure_diversity,
}
"""Those that need no model, by name; `clip_diversity` and `dreamsim_diversity` are in `metrics.embeddings`."""


@torch.no_grad()
def _flat(images_PK: Tensor, features: Callable[[Tensor], Tensor]) -> Tensor:
    """Features `[P, K, E]`, in double, of images `[P, K, 3, H, W]`."""
    prompts, count = images_PK.shape[:2]
    return features(images_PK.flatten(0, 1)).double().reshape(prompts, count, -1)


def _small(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    factor = max(1.0, max(height, width) / _PIXEL_SIDE)
    size = (max(1, round(height / factor)), max(1, round(width / factor)))
    return functional.interpolate(images.double(), size, mode="area").flatten(1)


def _orientations(images: Tensor) -> Tensor:
    y = luma(images.double())
    dy, dx = (y[:, 1:, :-1] - y[:, :-1, :-1]), (y[:, :-1, 1:] - y[:, :-1, :-1])
    bins = (torch.atan2(dy, dx) % torch.pi / torch.pi * _ORIENTATIONS).long().clamp(0, _ORIENTATIONS - 1)
    votes = functional.one_hot(bins, _ORIENTATIONS).permute(0, 3, 1, 2) * torch.hypot(dx, dy)[:, None]
    return functional.adaptive_avg_pool2d(votes, (_CELLS, _CELLS)).flatten(1)
