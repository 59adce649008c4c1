"""Final latents mixed with noise again: where algorithms look that do not look at the sampler's own states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdfo_engine.ops import moved, philox_normal, renoise_stream


@dataclass(frozen=True)
class Renoising:
    """`x_t = (1 - t) x_0 + t eps` at the times of a grid; eps is addressed by (seed, pair, step, branch).

    `sigmas`: float32 `[T + 1]` on the CPU. `backend`: that draws the noise.
    """

    sigmas: Tensor
    seed: int
    backend: str

    def noise(self, like: Tensor, pair_ids: Tensor, branch: Tensor, step: Tensor) -> Tensor:
        """eps of B items, float32 `[B, C, H, W]` on the device of `like` `[B, C, H, W]`; indices are int64 `[B]`."""
        return philox_normal(
            like.shape[1:], seed=self.seed, pair_ids=pair_ids, stream=renoise_stream(step, branch), device=like.device,
            backend=self.backend,
        )  # fmt: skip

    def latents(self, finals: Tensor, pair_ids: Tensor, branch: Tensor, step: Tensor) -> Tensor:
        """x_t of `finals` float32 `[B, C, H, W]` at the time of each item's step."""
        t = moved(self.sigmas[step], finals.device).view(-1, 1, 1, 1)
        return torch.lerp(finals, self.noise(finals, pair_ids, branch, step), t)
