"""Advantage Weighted Matching (arXiv 2509.25050): a policy gradient on the likelihood bound of the final image.

The bound is `lp` of `RenoisedImages`: its weight of all times is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fdfo_engine.algorithms.clipped_ratio import ClippedRatio
from fdfo_engine.algorithms.renoised_images import RenoisedImages
from fdfo_engine.config import AwmAlgorithm


@dataclass(frozen=True)
class Awm(RenoisedImages):
    """Every image is drawn toward, or away from, by its advantage in its group."""

    settings: AwmAlgorithm

    def objective(self, values: Tensor, normalizer: int, clip_range: float) -> ClippedRatio:
        """The clipped ratio of the bounds."""
        return ClippedRatio(values, normalizer, clip_range, self.log_ratio)
