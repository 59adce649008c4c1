"""Latents on the way of a sampling run, recomputed from its velocities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _compiled, _dispatch, _trajectory
from fdfo_engine.ops.philox import key_of

OFFERED = ("triton", "cuda", "cpp", "torch")
BLOCK = 128  # counters a Triton program; not tuned on a GPU yet
INTERPRETED_BLOCK = 16384  # the interpreter takes milliseconds a program, whatever its size


@torch.no_grad()
def replay(  # noqa: PLR0913
    velocities: Tensor,
    *,
    pair_ids: Sequence[int] | Tensor,
    pair: Sequence[int] | Tensor,
    branch: Sequence[int] | Tensor,
    step: Sequence[int] | Tensor,
    sigmas: Sequence[float] | Tensor,
    gammas: float | Tensor,
    seed: int,
    solver: _checks.Solver = "churn",
    backend: str | None = None,
) -> Tensor:
    """x_i of B items (pair, branch, i): the initial noise, then every step before i with its stored velocity.

    Each (pair, branch) among the items is walked once, to the largest step asked of it; the others are left alone.

    Args:
        velocities: `[P, 2, T, *shape]`, what `paired_step` wrote to `v_out`, in latent units a unit of t; float32,
            bfloat16 or float16.
        pair_ids: P global pair indices in 0..2^63-1, a sequence of ints or an int64 `[P]`.
        pair, branch, step: of each item, sequences of ints or int64 `[B]`, in 0..P-1, 0..1 and 0..T; step T is the
            final latent. Best on the CPU: what is to be walked is decided there.
        sigmas: the grid, in units of t: T + 1 numbers that fall and stay in 0..1 from the second on; a sequence, or
            float32 or float64 `[T + 1]`.
        gammas: churn at every grid point, without a unit, finite and >= 0: one number, or float32 or float64 `[T + 1]`
            or `[P, T + 1]`, the numbers that sampling used.
        seed: the run's seed, int in 0..2^64-1.
        solver: what sampling took `gammas` for; see `paired_step`.
        backend: None takes the fastest that runs on the velocities' device; a name of `ops.backends` forces one. To
            be what sampling computed, it must be the one that sampled.

    Returns:
        float32 `[B, *shape]` on the velocities' device, in latent units: bit for bit the latents of the sampling run,
        on the backend and device that sampled it.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device.
        BackendUnavailableError: `backend` can't run on the velocities' device.

    Source: METHOD, 'Noise is a function, not a state', last paragraph.
    """
    op = "replay"
    _checks.paired(op, "velocities", velocities, _checks.MODEL_DTYPES, extra="T, ")
    P, _, T = velocities.shape[:3]
    pairs = _checks.pair_ids(op, pair_ids, length=P).cpu()
    pair_B, branch_B, step_B = _items(op, pair, branch, step, P, T)
    grid = _checks.grid(op, sigmas, T)
    gammas_PT = _gammas(op, gammas, P, T)
    run_seed = _checks.seed(op, seed)
    run = _RUNS[_dispatch.choose(op, OFFERED, velocities.device, forced=backend)]
    row, row_B = torch.unique(2 * pair_B + branch_B, return_inverse=True)
    last = torch.zeros_like(row).scatter_reduce(0, row_B, step_B, "amax")
    chosen = _checks.solver(op, solver)
    walk = _Walk(
        row // 2, row % 2, pairs[row // 2], last, _coefficients(gammas_PT[row // 2], grid, chosen), run_seed,
        antithetic=chosen == "antithetic",
    )  # fmt: skip
    return run(velocities, walk, row_B, step_B)


@dataclass(frozen=True)
class _Walk:
    """R trajectories on the CPU: their row and branch in `velocities`, global pair, how far they are walked, all int64
    `[R]`, and the coefficients of their moves `[R, T + 1, 3]`.
    """

    index: Tensor
    branch: Tensor
    pair: Tensor
    last: Tensor
    coefficients: Tensor
    seed: int
    antithetic: bool

    def on(self, device: torch.device) -> _Walk:
        """With its tensors on `device`."""
        return replace(
            self,
            index=_checks.moved(self.index, device),
            branch=_checks.moved(self.branch, device),
            pair=_checks.moved(self.pair, device),
            last=_checks.moved(self.last, device),
            coefficients=_checks.moved(self.coefficients, device),
        )


def replay_reference(velocities: Tensor, walk: _Walk, row_B: Tensor, step_B: Tensor) -> Tensor:
    """The specification: item b is step `step_B[b]` of trajectory `row_B[b]`."""
    rows = _trajectory.Rows(walk.pair, walk.branch, walk.seed, walk.antithetic)
    first, device = walk.coefficients[:, 0], velocities.device
    x = _trajectory.start(rows, velocities.shape[3:], coefficients=first, device=device)
    out = torch.empty(len(step_B), *x.shape[1:], dtype=x.dtype, device=device)
    for i in range(velocities.shape[2] + 1):
        items, live = (step_B == i).nonzero()[:, 0], (walk.last > i).nonzero()[:, 0]
        out[items] = x[row_B[items]]
        if len(live):
            v = velocities[walk.index[live], walk.branch[live], i]
            between = walk.coefficients[live, i + 1]
            x[live] = _trajectory.advance(rows[live], x[live], v, coefficients=between, step=i)
    return out


def _replay_compiled(velocities: Tensor, walk: _Walk, row_B: Tensor, step_B: Tensor) -> Tensor:
    v, (wanted, item_B, out) = _compiled.inner_contiguous(velocities, 3), _outputs(velocities, walk, row_B, step_B)
    if out.numel():
        there, wanted = walk.on(v.device), _checks.moved(wanted, v.device)
        arguments = _compiled.arguments(
            "Replay", velocities=_compiled.strided(v), step_stride=v.stride(2), number=_compiled.NUMBERS[v.dtype],
            out=out.data_ptr(), index=there.index.data_ptr(), branch=there.branch.data_ptr(),
            pair=there.pair.data_ptr(), last=there.last.data_ptr(), wanted=wanted.data_ptr(),
            coefficients=there.coefficients.data_ptr(), antithetic=walk.antithetic, rows=len(walk.index),
            steps=v.shape[2], size=_compiled.latent_size(v, 3), seed=key_of(walk.seed),
        )  # fmt: skip
        _compiled.call("replay", v.device, arguments)
    return out if item_B is None else out[_checks.moved(item_B, v.device)]


def _replay_triton(velocities: Tensor, walk: _Walk, row_B: Tensor, step_B: Tensor) -> Tensor:
    from fdfo_engine.kernels.replay import replay_kernel  # triton: only where it runs

    v, (wanted, item_B, out) = _compiled.inner_contiguous(velocities, 3), _outputs(velocities, walk, row_B, step_B)
    if out.numel():
        block, size = BLOCK if v.is_cuda else INTERPRETED_BLOCK, _compiled.latent_size(v, 3)
        there, wanted = walk.on(v.device), _checks.moved(wanted, v.device)
        with torch.cuda.device_of(v):  # triton launches on the current device, not on the tensor's
            replay_kernel[(len(walk.index) * -(-size // (4 * block)),)](
                v, out, there.index, there.branch, there.pair, there.last, wanted, there.coefficients, size, v.shape[2],
                *v.stride()[:3], *key_of(walk.seed), ANTITHETIC=walk.antithetic, BLOCK=block, enable_fp_fusion=False,
            )  # fmt: skip
    return out if item_B is None else out[_checks.moved(item_B, v.device)]


_RUNS = {
    "torch": replay_reference,
    "triton": _replay_triton,
    "cpp": _replay_compiled,
    "cuda": _replay_compiled,
}


def _outputs(velocities: Tensor, walk: _Walk, row_B: Tensor, step_B: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """What a kernel writes: for each trajectory and step the row of the output or -1, int64 `[R, T + 1]`, and the
    output. Where items repeat, each is made once, and the second value has its row for every item.
    """
    T = velocities.shape[2]
    key, item_B = torch.unique(row_B * (T + 1) + step_B, return_inverse=True)
    wanted = torch.full((len(walk.index), T + 1), -1)
    repeated = len(key) < len(step_B)
    if repeated:
        wanted.view(-1)[key] = torch.arange(len(key))
    else:
        wanted[row_B, step_B] = torch.arange(len(step_B))
    out = torch.empty(len(key), *velocities.shape[3:], dtype=torch.float32, device=velocities.device)
    return wanted, item_B if repeated else None, out


def _coefficients(gammas_RT: Tensor, sigmas: Sequence[float], solver: _checks.Solver) -> Tensor:
    """Of the prior and of every step, `[R, T + 1, 3]`."""
    grid = torch.tensor(sigmas, dtype=torch.float64)
    prior = _trajectory.prior_coefficients(gammas_RT[:, :1], solver)
    return torch.cat([prior, _trajectory.step_coefficients(grid[:-1], grid[1:], gammas_RT[:, 1:], solver)], 1)


def _items(
    op: str,
    pair: Sequence[int] | Tensor,
    branch: Sequence[int] | Tensor,
    step: Sequence[int] | Tensor,
    P: int,
    T: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pair, branch and step of each item on the CPU."""
    pair_B = _checks.integers(op, "pair", pair, length=None, limit=P).cpu()
    branch_B = _checks.integers(op, "branch", branch, length=len(pair_B), limit=2).cpu()
    return pair_B, branch_B, _checks.integers(op, "step", step, length=len(pair_B), limit=T + 1).cpu()


def _gammas(op: str, gammas: float | Tensor, P: int, T: int) -> Tensor:
    """Churn as float64 `[P, T + 1]` on the CPU."""
    if isinstance(gammas, Tensor) and gammas.ndim == 1:
        return _checks.churn(op, "gammas", gammas, (T + 1,)).cpu().expand(P, T + 1)
    return _checks.churn(op, "gammas", gammas, (P, T + 1)).cpu()
