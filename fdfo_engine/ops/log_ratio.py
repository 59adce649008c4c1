"""The log-ratio of each (sample, step), differentiable: for losses other than `fdfo_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfo_engine.ops import _dispatch
from fdfo_engine.ops.fdfo_loss import BACKWARD, FORWARD, Batch, Outputs, check_tensors, items_of

OFFERED = ("triton", "cuda", "cpp", "torch")


def log_ratio(
    v: Tensor,
    v_old: Tensor,
    u: Tensor,
    *,
    pair: Sequence[int] | Tensor | None = None,
    branch: Sequence[int] | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`l = -(mean(e^2) + 2*mean(e*u))`, `e = v - v_old`; means over one latent.

    Differentiable in `v` only: `dl/dv = (-2/n) * (e + u)`, n elements a latent, rounded to the dtype of `v`. Whatever a
    caller makes of l, its gradient is one number a row times (e + u), which the kernels of `fdfo_loss` compute.

    Args:
        v, v_old, u, pair, branch, backend: as of `fdfo_loss`.

    Returns:
        l of each row, float32 `[B]`, in nats. Sums are in float64, in a fixed order: two calls agree bit for bit.

    Raises:
        ValueError: an argument is of the wrong shape, dtype or device; one of pair and branch without the other.
        BackendUnavailableError: `backend` can't run on `v`'s device.

    Source: METHOD, 'Update'.
    """
    op = "log_ratio"
    check_tensors(op, v, v_old, u)
    pair_B, branch_B = items_of(op, v, u, pair, branch)
    implementation = _dispatch.choose(op, OFFERED, v.device, forced=backend)
    if implementation == "torch":
        return log_ratio_reference(v, v_old, u[pair_B], (1 - 2 * branch_B).double())
    found: Tensor = _LogRatio.apply(v, v_old, u, pair_B, branch_B, implementation)
    return found


def log_ratio_reference(v: Tensor, v_old: Tensor, u: Tensor, sign_B: Tensor) -> Tensor:
    """The specification; `u` is `[B, *shape]` of branch 0. Float64 inside."""
    e_BN = (v.double() - v_old.detach().double()).flatten(1)
    u_BN = sign_B[:, None] * u.detach().double().flatten(1)
    return -(e_BN.square().mean(1) + 2 * (e_BN * u_BN).mean(1)).float()


class _LogRatio(torch.autograd.Function):
    """The forward of the loss with every advantage at 0, and its backward with a factor of the caller's."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, v_old: Tensor, u: Tensor, pair: Tensor, branch: Tensor, backend: str) -> Tensor:
        batch = Batch(v, v_old, u, pair, branch).readable()
        out = Outputs.empty(batch.v)
        if len(v):
            no_advantage = torch.zeros(len(v), dtype=torch.float64, device=v.device)
            FORWARD[backend](batch, no_advantage, 1.0, 1.0, out)
        ctx.save_for_backward(*batch)
        ctx.backend = backend
        return out.log_ratio

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        batch = Batch(*ctx.saved_tensors)
        grad = torch.empty(batch.v.shape, dtype=batch.v.dtype, device=batch.v.device)
        if len(grad):
            scale = upstream.double() * (-2 / batch.size)
            BACKWARD[ctx.backend](batch, scale, torch.ones((), device=grad.device), grad)
        return grad, *[None] * 5
