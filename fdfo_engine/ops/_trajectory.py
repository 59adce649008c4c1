"""The two moves of a trajectory, on rows: sampling and replay share them, so that both agree bit for bit.

Coefficients are computed in float64 on the CPU and rounded to float32 once; products and sums of tensors are separate
operations, so none is contracted. A row never depends on the other rows of its batch. `gamma` is float64 `[R]` on the
CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdfo_engine.ops.philox import SHARED_STREAM, churn_stream
from fdfo_engine.ops.philox_normal import philox_normal


@dataclass(frozen=True)
class Rows:
    """Who R trajectories are: global `pair_ids` and `branch`, int64 `[R]` on the CPU, and where their noise is from."""

    pair_ids: Tensor
    branch: Tensor
    seed: int
    backend: str | None

    @classmethod
    def of_pairs(cls, pair_ids: Tensor, seed: int, backend: str | None) -> Rows:
        """Both branches of every pair: the rows of a `[P, 2, *shape]` tensor, in order."""
        return cls(pair_ids.repeat_interleave(2), torch.arange(2).repeat(len(pair_ids)), seed, backend)

    def __getitem__(self, index: Tensor) -> Rows:
        return Rows(self.pair_ids[index], self.branch[index], self.seed, self.backend)

    def normal(self, shape: Sequence[int], stream: int | Tensor, device: torch.device) -> Tensor:
        """Noise, float32 `[R, *shape]`."""
        return philox_normal(
            shape, seed=self.seed, pair_ids=self.pair_ids, stream=stream, device=device, backend=self.backend
        )


def start(rows: Rows, shape: Sequence[int], *, gamma: Tensor, device: torch.device) -> Tensor:
    """Initial latents, float32 `[R, *shape]`: `(n + sqrt((1+g)^2 - 1) * eps) / (1 + g)`."""
    n = rows.normal(shape, SHARED_STREAM, device)
    keep = 1 / (1 + gamma)
    return _renoise_(rows, n, gamma, keep=keep, noise=_spread(gamma) * keep, k=0)


def advance(
    rows: Rows, x: Tensor, velocity: Tensor, *, sigma: float, sigma_next: float, gamma: Tensor, step: int
) -> Tensor:
    """Latents after step `step`, float32 `[R, *shape]`: overshoot to r, then renoise back to `sigma_next`."""
    r = sigma_next / (1 + gamma - gamma * sigma_next)
    overshot = x + _column(r - sigma, x) * velocity.float()
    keep = 1 / (1 + gamma * r)
    return _renoise_(rows, overshot, gamma, keep=keep, noise=r * _spread(gamma) * keep, k=step + 1)


def _renoise_(rows: Rows, x: Tensor, gamma: Tensor, *, keep: Tensor, noise: Tensor, k: int) -> Tensor:
    """`keep * x + noise * eps` in place, in the rows with churn: the others stay plain Euler to the bit."""
    churned = gamma.nonzero()[:, 0]
    if len(churned) == 0:
        return x
    touched = rows[churned]
    eps = touched.normal(x.shape[1:], churn_stream(k, touched.branch), x.device)
    target = churned.to(x.device)
    x[target] = _column(keep[churned], x) * x[target] + _column(noise[churned], x) * eps
    return x


def _spread(gamma: Tensor) -> Tensor:
    """`sqrt((1+g)^2 - 1)`, without its cancellation at small g."""
    return torch.sqrt(gamma * (2 + gamma))


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, torch.float32).view(-1, *[1] * (like.ndim - 1))
