"""Initial latents of pairs: noise that both branches share, and the prior's churn on top."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch, _trajectory

OFFERED = ("torch",)


@torch.no_grad()
def paired_noise(
    pair_ids: Sequence[int] | Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    gamma: float | Tensor,
    device: torch.device | str,
    backend: str | None = None,
) -> Tensor:
    """`(n + sqrt((1+g)^2 - 1) * eps) / (1 + g)`: n shared by the branches, eps fresh for each. Variance stays 1.

    Args:
        pair_ids: P global pair indices in 0..2^63-1, a sequence of ints or an int64 `[P]`.
        shape: of one latent, at least one axis.
        seed: the run's seed, int in 0..2^64-1.
        gamma: churn at grid point 0, finite and >= 0: one number, or float32 or float64 `[P]` on any device. A pair
            with 0 gets n itself, the same bits in both branches.
        device: where the latents go.
        backend: None or "torch". The noise inside takes the same choice (`philox_normal`).

    Returns:
        float32 `[P, 2, *shape]`. Repeats bit for bit; a pair never depends on the others.

    Raises:
        ValueError: an argument is out of range or of the wrong shape or type.
        BackendUnavailableError: `backend` can't run on `device`.

    Source: METHOD, 'Paired sampling' 1 and 2.
    """
    op = "paired_noise"
    pairs = _checks.pair_ids(op, pair_ids)
    sizes, target = _checks.latent_shape(op, shape), _checks.device(op, device)
    gamma_P = _checks.churn(op, "gamma", gamma, (len(pairs),))
    _dispatch.choose(op, OFFERED, target, forced=backend)
    rows = _trajectory.Rows.of_pairs(pairs, _checks.seed(op, seed), backend)
    x = _trajectory.start(rows, sizes, gamma=gamma_P.repeat_interleave(2), device=target)
    return x.view(len(pairs), 2, *sizes)
