"""What the rewards of a pair say: which branch is better, and by how much."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantage:
    """Signed advantages, float32 `[P, 2]`, and why some are zero, each pair counted once, bool `[P]` each."""

    values: Tensor
    lost: Tensor
    tied: Tensor
    still: Tensor

    @property
    def live(self) -> Tensor:
        """Pairs that pull at the weights, bool `[P]`."""
        return (self.values != 0).any(1)


def advantage(rewards: Tensor, direction: Tensor) -> Advantage:
    """`A_0 = (R_a - R_b) / 2`, `A_1 = -A_0`; 0 for a pair without an opinion, a tie, or equal images.

    Args:
        rewards: float `[P, 2]`; NaN or infinite in either branch is no opinion on the pair.
        direction: u of branch 0, `[P, C, H, W]`; all 0 where both branches ended in the same latent.
    """
    rewards = rewards.double()
    half = ((rewards[:, 0] - rewards[:, 1]) / 2).float()  # rounded first: what counts as a tie is what the loss sees
    lost = ~torch.isfinite(half)
    tied = half == 0
    still = ~lost & ~tied & ~direction.flatten(1).any(1).to(rewards.device)
    first = torch.where(lost | tied | still, 0.0, half)
    return Advantage(torch.stack([first, -first], 1), lost, tied, still)


def given_advantage(values: Tensor, direction: Tensor) -> Advantage:
    """Advantages that a caller made himself, `[P, 2]`, already signed for each branch; NaN in either is no opinion."""
    values = values.float()
    lost = ~torch.isfinite(values).all(1)
    tied = ~lost & (values == 0).all(1)
    still = ~lost & ~tied & ~direction.flatten(1).any(1).to(values.device)
    return Advantage(torch.where((lost | tied | still)[:, None], 0.0, values), lost, tied, still)
