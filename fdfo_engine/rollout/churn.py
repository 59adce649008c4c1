"""The three churn schedules: how much fresh noise each grid point gets (METHOD, 'Paired sampling')."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fdfo_engine.config import ChurnConfig, IntervalChurn, PriorChurn, RawChurn
from fdfo_engine.ops import pair_scalar_normal

MIN_DENSITY = 1e-6
"""Below this total, the density of an interval schedule says nothing, and its weight is spread evenly."""


def churn_gammas(churn: ChurnConfig, sigmas: Tensor, pair_ids: Sequence[int], seed: int) -> Tensor:
    """gamma_k of every pair at every grid point, float64 `[P, T + 1]`; the last column is 0.

    `sigmas` is the grid, `[T + 1]`. A schedule with a random scalar draws it from the pair's own stream, so gammas
    depend on (seed, pair) and on nothing else.
    """
    sigmas = sigmas.double()
    scalar = torch.as_tensor(pair_scalar_normal(pair_ids, seed=seed), dtype=torch.float64)
    match churn:
        case RawChurn():
            gammas = torch.full((len(pair_ids), len(sigmas)), churn.weight, dtype=torch.float64)
        case PriorChurn():
            gammas = torch.zeros(len(pair_ids), len(sigmas), dtype=torch.float64)
            weight = torch.exp(math.log(churn.weight) + churn.weight_sigma * scalar)
            gammas[:, (sigmas - 1).abs().argmin()] = torch.expm1(weight)
        case IntervalChurn():
            centre = churn.mu + churn.sigma * scalar
            gammas = torch.expm1(churn.weight * _interval_shares(sigmas, centre, churn.soft_sigma))
    gammas[:, -1] = 0.0
    return gammas


def _interval_shares(sigmas: Tensor, centre: Tensor, soft_sigma: float) -> Tensor:
    """Logit-normal density around `centre` `[P]` at every grid point, 0 at t = 0 and 1, summing to 1 over k < T."""
    inside = (sigmas > 0) & (sigmas < 1)
    t = torch.where(inside, sigmas, 0.5)
    z = (torch.logit(t) - centre[:, None]) / soft_sigma
    density = torch.exp(-0.5 * z**2) / (soft_sigma * math.sqrt(2 * math.pi) * t * (1 - t)) * inside
    density[:, -1] = 0.0
    total = density.sum(1, keepdim=True)
    even = torch.full_like(density, 1.0 / (len(sigmas) - 1))
    return torch.where(total < MIN_DENSITY, even, density / total.clamp_min(MIN_DENSITY))
