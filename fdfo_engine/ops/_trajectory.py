"""The two moves of a trajectory, on rows: sampling and replay share them, so that both agree bit for bit.

Coefficients are computed in float64 and rounded to float32 once, for every backend. In the torch reference below,
products and sums of tensors are separate operations, so none is contracted, and a row never depends on the other rows
of its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdfo_engine.ops import _checks
from fdfo_engine.ops._checks import Solver
from fdfo_engine.ops.philox import SHARED_STREAM, churn_stream
from fdfo_engine.ops.philox_normal import philox_normal


def prior_coefficients(gamma: Tensor, solver: Solver = "churn") -> Tensor:
    """`(0, keep, noise)` of `keep * n + noise * eps`, float32 `[..., 3]`, for float64 gamma `[...]`.

    Of an SDE, gamma in 0..1 is the branch's own share of the noise: `keep^2 + gamma^2 = 1`.
    """
    if solver == "sde":
        return _rounded(torch.zeros_like(gamma), torch.sqrt(1 - gamma**2), gamma)
    keep = 1 / (1 + gamma)
    return _rounded(torch.zeros_like(gamma), keep, _spread(gamma) * keep)


def step_coefficients(sigma: Tensor, sigma_next: Tensor, gamma: Tensor, solver: Solver = "churn") -> Tensor:
    """`(move, keep, noise)` of `keep * (x + move * v) + noise * eps`, float32 `[..., 3]`.

    Of churn: overshoot to r, renoise. Of an SDE with level s and `dt < 0`, its Euler step: mean
    `x * (1 + s^2 dt / (2t)) + v * (1 + s^2 (1 - t) / (2t)) * dt`, noise `s * sqrt(-dt)`.
    All float64 tensors: a Python number over a tensor is not one division, and replay would differ from sampling.
    """
    if solver == "sde":
        dt, half = sigma_next - sigma, gamma**2 / (2 * sigma)
        keep = 1 + half * dt
        return _rounded((1 + half * (1 - sigma)) * dt / keep, keep, gamma * torch.sqrt(-dt))
    r = sigma_next / (1 + gamma - gamma * sigma_next)
    keep = 1 / (1 + gamma * r)
    return _rounded(r - sigma, keep, r * _spread(gamma) * keep)


def step_table(sigma: float, sigma_next: float, gamma: Tensor, device: torch.device, solver: Solver) -> Tensor:
    """`step_coefficients` of every pair on `device`, `[P, 3]`."""
    if gamma.is_cuda:
        start, end = (torch.full((), value, dtype=gamma.dtype, device=gamma.device) for value in (sigma, sigma_next))
        return step_coefficients(start, end, gamma, solver)
    return _step_table(sigma, sigma_next, tuple(gamma.tolist()), device, solver)


# A run asks for the same few tables at every block: kept, they cost no copy to the device, and a graph may hold them.
@functools.lru_cache(maxsize=1024)
def _step_table(
    sigma: float, sigma_next: float, gamma: tuple[float, ...], device: torch.device, solver: Solver
) -> Tensor:
    t, s, gamma_P = (torch.tensor(value, dtype=torch.float64) for value in (sigma, sigma_next, gamma))
    return _checks.moved(step_coefficients(t, s, gamma_P, solver), device)


@dataclass(frozen=True)
class Rows:
    """Who R trajectories are: global `pair_ids` and `branch`, int64 `[R]` on the CPU, and where their noise is from.

    With `antithetic`, fresh noise is that of branch 0 for both, and branch 1 takes it with the other sign.
    """

    pair_ids: Tensor
    branch: Tensor
    seed: int
    antithetic: bool

    @classmethod
    def of_pairs(cls, pair_ids: Tensor, seed: int, antithetic: bool) -> Rows:
        """Both branches of every pair: the rows of a `[P, 2, *shape]` tensor, in order."""
        branch = torch.arange(2).repeat(len(pair_ids))
        return cls(pair_ids.cpu().repeat_interleave(2), branch, seed, antithetic)

    def __getitem__(self, index: Tensor) -> Rows:
        return Rows(self.pair_ids[index], self.branch[index], self.seed, self.antithetic)

    def fresh(self, shape: Sequence[int], k: int, device: torch.device) -> Tensor:
        """Fresh noise at grid point k, float32 `[R, *shape]`."""
        if not self.antithetic:
            return self.normal(shape, churn_stream(k, self.branch), device)
        eps = self.normal(shape, churn_stream(k, 0), device)
        return _column(1.0 - 2.0 * self.branch, eps) * eps

    def normal(self, shape: Sequence[int], stream: int | Tensor, device: torch.device) -> Tensor:
        """Noise of the torch backend, float32 `[R, *shape]`."""
        return philox_normal(
            shape, seed=self.seed, pair_ids=self.pair_ids, stream=stream, device=device, backend="torch"
        )


def start(rows: Rows, shape: Sequence[int], *, coefficients: Tensor, device: torch.device) -> Tensor:
    """Initial latents, float32 `[R, *shape]`: `(n + sqrt((1+g)^2 - 1) * eps) / (1 + g)`."""
    return _renoise_(rows, rows.normal(shape, SHARED_STREAM, device), coefficients, k=0)


def advance(rows: Rows, x: Tensor, velocity: Tensor, *, coefficients: Tensor, step: int) -> Tensor:
    """Latents after step `step`, float32 `[R, *shape]`: overshoot to r, then renoise back to the next grid point."""
    overshot = x + _column(coefficients[:, 0], x) * velocity.float()
    return _renoise_(rows, overshot, coefficients, k=step + 1)


def _renoise_(rows: Rows, x: Tensor, coefficients: Tensor, *, k: int) -> Tensor:
    """`keep * x + noise * eps` in place, in the rows with churn: the others stay plain Euler to the bit."""
    _, keep, noise = coefficients.cpu().unbind(-1)
    churned = ((noise != 0) | (keep != 1)).nonzero()[:, 0]
    if len(churned) == 0:
        return x
    touched = rows[churned]
    eps = touched.fresh(x.shape[1:], k, x.device)
    target = churned.to(x.device)
    x[target] = _column(keep[churned], x) * x[target] + _column(noise[churned], x) * eps
    return x


def _rounded(*columns: Tensor) -> Tensor:
    return torch.stack(columns, -1).float()


def _spread(gamma: Tensor) -> Tensor:
    """`sqrt((1+g)^2 - 1)`, without its cancellation at small g."""
    return torch.sqrt(gamma * (2 + gamma))


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))
