"""Latents on the way of a sampling run, recomputed from its velocities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch, _trajectory

OFFERED = ("torch",)


@torch.no_grad()
def replay(
    velocities: Tensor,
    *,
    pair_ids: Sequence[int] | Tensor,
    pair: Sequence[int] | Tensor,
    branch: Sequence[int] | Tensor,
    step: Sequence[int] | Tensor,
    sigmas: Sequence[float] | Tensor,
    gammas: float | Tensor,
    seed: int,
    backend: str | None = None,
) -> Tensor:
    """x_i of B items (pair, branch, i): the initial noise, then every step before i with its stored velocity.

    Each (pair, branch) among the items is walked once, to the largest step asked of it; the others are left alone.

    Args:
        velocities: `[P, 2, T, *shape]`, what `paired_step` wrote to `v_out`; float32, bfloat16 or float16.
        pair_ids: P global pair indices in 0..2^63-1, a sequence of ints or an int64 `[P]`.
        pair, branch, step: of each item, sequences of ints or int64 `[B]` on any device, in 0..P-1, 0..1 and 0..T;
            step T is the final latent.
        sigmas: the grid, T + 1 numbers that fall and stay in 0..1 from the second on: a sequence, or float32 or
            float64 `[T + 1]`.
        gammas: churn at every grid point, finite and >= 0: one number, or float32 or float64 `[T + 1]` or
            `[P, T + 1]`, the numbers that sampling used.
        seed: the run's seed, int in 0..2^64-1.
        backend: None or "torch", as in sampling. The noise inside takes the same choice (`philox_normal`).

    Returns:
        float32 `[B, *shape]` on the velocities' device: bit for bit the latents of the sampling run, on the backend
        and device that sampled it.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device.
        BackendUnavailableError: `backend` can't run on the velocities' device.

    Source: METHOD, 'Noise is a function, not a state', last paragraph.
    """
    op = "replay"
    _checks.paired(op, "velocities", velocities, _checks.MODEL_DTYPES, extra="T, ")
    P, _, T = velocities.shape[:3]
    pairs = _checks.pair_ids(op, pair_ids, length=P)
    pair_B = _checks.integers(op, "pair", pair, length=None, limit=P)
    branch_B = _checks.integers(op, "branch", branch, length=len(pair_B), limit=2)
    step_B = _checks.integers(op, "step", step, length=len(pair_B), limit=T + 1)
    grid = _checks.grid(op, sigmas, T)
    gammas_PT = _gammas(op, gammas, P, T)
    run_seed = _checks.seed(op, seed)
    _dispatch.choose(op, OFFERED, velocities.device, forced=backend)
    row, row_B = torch.unique(2 * pair_B + branch_B, return_inverse=True)
    rows = _trajectory.Rows(pairs[row // 2], row % 2, run_seed, backend)
    return replay_reference(velocities, row // 2, row_B, step_B, rows, grid, gammas_PT[row // 2])


def replay_reference(
    velocities: Tensor,
    pair: Tensor,
    row_B: Tensor,
    step_B: Tensor,
    rows: _trajectory.Rows,
    sigmas: Sequence[float],
    gammas_RT: Tensor,
) -> Tensor:
    """The specification: R trajectories, `pair` their row of `velocities`; item b is step `step_B[b]` of `row_B[b]`."""
    last = torch.zeros_like(pair).scatter_reduce(0, row_B, step_B, "amax")
    x = _trajectory.start(rows, velocities.shape[3:], gamma=gammas_RT[:, 0], device=velocities.device)
    out = torch.empty(len(step_B), *x.shape[1:], dtype=x.dtype, device=x.device)
    for i in range(velocities.shape[2] + 1):
        items, live = (step_B == i).nonzero()[:, 0], (last > i).nonzero()[:, 0]
        out[items] = x[row_B[items]]
        if len(live):
            between = {"sigma": sigmas[i], "sigma_next": sigmas[i + 1]}
            v, gamma = velocities[pair[live], rows.branch[live], i], gammas_RT[live, i + 1]
            x[live] = _trajectory.advance(rows[live], x[live], v, gamma=gamma, step=i, **between)
    return out


def _gammas(op: str, gammas: float | Tensor, P: int, T: int) -> Tensor:
    """Churn as float64 `[P, T + 1]` on the CPU."""
    if isinstance(gammas, Tensor) and gammas.ndim == 1:
        return _checks.churn(op, "gammas", gammas, (T + 1,)).expand(P, T + 1)
    return _checks.churn(op, "gammas", gammas, (P, T + 1))
