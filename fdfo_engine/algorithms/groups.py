"""Images of one prompt as a group, against whose mean each is rewarded."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fdfo_engine.runtime.distributed import all_gather_rows
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import Advantage, given_advantage

LEAST_SPREAD = 1e-4
"""Added to the standard deviation of the rewards."""


def group_advantage(rewards: Tensor, rollout: Rollout, clip: float) -> Advantage:
    """`group_relative` of this rank's pairs; images of equal prompts are a group. Collective."""
    groups = all_gather_rows(torch.tensor([_number(prompt) for prompt in rollout.prompts], dtype=torch.int64))
    return given_advantage(group_relative(rewards, groups, clip)[rollout.local_rows], rollout.direction)


def group_relative(rewards: Tensor, groups: Tensor, clip: float) -> Tensor:
    """`A = (R - mean of the group) / (standard deviation of all + 1e-4)`, clipped to +-`clip`.

    Args:
        rewards: float `[N, 2]`: two images of each of N prompts; NaN in either leaves both out.
        groups: int64 `[N]`; equal numbers are one group.

    Returns:
        float64 `[N, 2]`, NaN where there is no reward.
    """
    known = torch.isfinite(rewards).all(1)
    values = torch.full(rewards.shape, torch.nan, dtype=torch.float64)
    own, index = rewards[known].double(), torch.unique(groups[known], return_inverse=True)[1]
    if not len(own):
        return values
    count = torch.bincount(index)
    mean = torch.zeros(len(count), dtype=torch.float64).index_add_(0, index, own.sum(1)) / (2 * count)
    spread = own.std(correction=0) + LEAST_SPREAD
    values[known] = ((own - mean[index, None]) / spread).clamp(-clip, clip)
    return values


def _number(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7])
