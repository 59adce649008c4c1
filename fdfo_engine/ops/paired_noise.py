"""Initial latents of pairs: noise that both branches share, and the prior's churn on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _compiled, _dispatch, _trajectory
from fdfo_engine.ops.philox import key_of

OFFERED = ("triton", "cuda", "cpp", "torch")
BLOCK = 256  # counters a Triton program; not tuned on a GPU yet
INTERPRETED_BLOCK = 16384  # the interpreter takes milliseconds a program, whatever its size


@torch.no_grad()
def paired_noise(
    pair_ids: Sequence[int] | Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    gamma: float | Tensor,
    device: torch.device | str,
    solver: _checks.Solver = "churn",
    backend: str | None = None,
) -> Tensor:
    """`(n + sqrt((1+g)^2 - 1) * eps) / (1 + g)`: n shared by the branches, eps fresh for each. Variance stays 1.

    Solver `antithetic` gives branch 1 the eps of branch 0 with the other sign; `sde` takes g, in 0..1, as the branch's
    own share: `sqrt(1 - g^2) * n + g * eps`.

    Args:
        pair_ids: P global pair indices in 0..2^63-1, a sequence of ints or an int64 `[P]`.
        shape: of one latent, at least one axis.
        seed: the run's seed, int in 0..2^64-1.
        gamma: churn at grid point 0, without a unit, finite and >= 0: one number, or float32 or float64 `[P]` on any
            device. A pair with 0 gets n itself, the same bits in both branches.
        device: where the latents go.
        solver: what `gamma` is; see `paired_step`.
        backend: None takes the fastest that runs on `device`; a name of `ops.backends` forces one.

    Returns:
        float32 `[P, 2, *shape]`, in latent units: those in which noise has variance 1. Repeats bit for bit; a pair
        never depends on the others.

    Raises:
        ValueError: an argument is out of range or of the wrong shape or type.
        BackendUnavailableError: `backend` can't run on `device`.

    Source: METHOD, 'Paired sampling' 1 and 2.
    """
    op = "paired_noise"
    pairs = _checks.pair_ids(op, pair_ids)
    sizes, target = _checks.latent_shape(op, shape), _checks.device(op, device)
    gamma_P = _checks.churn(op, "gamma", gamma, (len(pairs),))
    run = _RUNS[_dispatch.choose(op, OFFERED, target, forced=backend)]
    chosen = _checks.solver(op, solver)
    prior = _Prior(pairs, _trajectory.prior_coefficients(gamma_P, chosen), chosen == "antithetic")
    return run(prior, sizes, _checks.seed(op, seed), target)


class _Prior(NamedTuple):
    """Global pairs, int64 `[P]`, coefficients of their fresh noise, `[P, 3]`, and whether the branches oppose it."""

    pair: Tensor
    coefficients: Tensor
    antithetic: bool


def paired_noise_reference(prior: _Prior, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """The specification; see `_trajectory.start`."""
    rows = _trajectory.Rows.of_pairs(prior.pair, seed, prior.antithetic)
    x = _trajectory.start(rows, shape, coefficients=prior.coefficients.repeat_interleave(2, 0), device=device)
    return x.view(len(prior.pair), 2, *shape)


def _paired_noise_compiled(prior: _Prior, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    x = torch.empty(len(prior.pair), 2, *shape, dtype=torch.float32, device=device)
    if x.numel():
        pair_P, coefficients = _checks.moved(prior.pair, device), _checks.moved(prior.coefficients, device)
        arguments = _compiled.arguments(
            "PairedNoise", out=x.data_ptr(), pair=pair_P.data_ptr(), coefficients=coefficients.data_ptr(),
            antithetic=prior.antithetic, pairs=len(pair_P), size=_compiled.latent_size(x, 2), seed=key_of(seed),
        )  # fmt: skip
        _compiled.call("paired_noise", device, arguments)
    return x


def _paired_noise_triton(prior: _Prior, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    from fdfo_engine.kernels.paired_noise import paired_noise_kernel

    x = torch.empty(len(prior.pair), 2, *shape, dtype=torch.float32, device=device)
    if x.numel():
        block, size = BLOCK if x.is_cuda else INTERPRETED_BLOCK, _compiled.latent_size(x, 2)
        tables = _checks.moved(prior.pair, device), _checks.moved(prior.coefficients, device)
        with torch.cuda.device_of(x):
            paired_noise_kernel[(len(prior.pair) * -(-size // (4 * block)),)](
                *tables, x, size, *key_of(seed), ANTITHETIC=prior.antithetic, BLOCK=block, enable_fp_fusion=False
            )
    return x


_RUNS = {
    "torch": paired_noise_reference,
    "triton": _paired_noise_triton,
    "cpp": _paired_noise_compiled,
    "cuda": _paired_noise_compiled,
}
