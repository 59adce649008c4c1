"""The clipped surrogate that pulls the velocity toward the better image of a pair."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch

OFFERED = ("torch",)


def fdfo_loss(
    v: Tensor,
    v_old: Tensor,
    u: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    pair: Sequence[int] | Tensor | None = None,
    branch: Sequence[int] | Tensor | None = None,
    normalizer: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`L = sum_b [-A*rho + |A| / (2c) * (rho - 1)^2] / normalizer`, `rho = exp(l)`, `l = -(mean(e^2) + 2*mean(e*u))`.

    `e = v - v_old`; means over one latent. l equals `mean(u^2) - mean((v - v*)^2)` with the target `v* = v_old - u`.
    Differentiable in `v` only: `dL/dv = (-A*rho + |A|/c * (rho-1)*rho) * (-2/n) * (e + u) / normalizer`, rounded to
    the dtype of `v`. A row with A = 0 gets exactly 0, whatever its rho. A far-off `v` has l -> -inf, rho = 0 and
    gradient 0, never NaN. Where rho^2 leaves float32 (l > 44, possible only where mean(u^2) is above that too), loss
    and gradient are not finite, and the step is for the caller to skip.

    Args:
        v: velocity of the policy, guided and rounded as in sampling, `[B, *shape]`, finite; float32, bfloat16 or
            float16.
        v_old: velocity of the rollout, as `v`; the dtype may differ.
        u: `pair_direction`, float32 `[P, *shape]`.
        advantage: A, signed for its branch, finite; float32 or float64 `[B]`.
        clip_range: c > 0.
        pair, branch: rows of `u`, and where to negate it (branch 1): sequences of ints or int64 `[B]`. Without them
            B = 2P: both branches of every pair, in order.
        normalizer: replaces B: the items of the whole optimiser step; > 0.
        backend: None or "torch".

    Returns:
        The loss, float32 scalar, and the log-ratio l of each row, float32 `[B]`, detached. Sums are in float64, in a
        fixed order: two calls agree bit for bit.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device; B = 0 without a normalizer;
            one of pair and branch without the other.
        BackendUnavailableError: `backend` can't run on `v`'s device.

    Source: METHOD, 'Update'.
    """
    op = "fdfo_loss"
    _check_tensors(op, v, v_old, u, advantage)
    clip, total = _positive(op, "clip_range", clip_range), len(v) if normalizer is None else normalizer
    if normalizer is None and len(v) == 0:
        _checks.refuse(op, "normalizer", None, "a number above 0 where v has no rows")
    pair_B, branch_B = _items(op, len(v), len(u), pair, branch)
    _dispatch.choose(op, OFFERED, v.device, forced=backend)
    total = _positive(op, "normalizer", total)
    sign_B = (1 - 2 * branch_B).to(v.device, torch.float64)
    return fdfo_loss_reference(v, v_old, u[pair_B.to(v.device)], sign_B, advantage.detach().double(), clip, total)


def fdfo_loss_reference(
    v: Tensor, v_old: Tensor, u: Tensor, sign_B: Tensor, A_B: Tensor, clip_range: float, normalizer: float
) -> tuple[Tensor, Tensor]:
    """The specification; `u` is `[B, *shape]` of branch 0. Float64 inside: e^2 of any float32 stays finite."""
    e_BN = (v.double() - v_old.detach().double()).flatten(1)
    u_BN = sign_B[:, None] * u.detach().double().flatten(1)
    log_ratio = -(e_BN.square().mean(1) + 2 * (e_BN * u_BN).mean(1))
    rho = torch.where(A_B == 0, 0.0, log_ratio).exp()  # masked before exp: 0 * inf would be NaN in both directions
    surrogate = -A_B * rho + A_B.abs() / (2 * clip_range) * (rho - 1).square()
    return (surrogate.sum() / normalizer).float(), log_ratio.detach().float()


def _check_tensors(op: str, v: Tensor, v_old: Tensor, u: Tensor, advantage: Tensor) -> None:
    _checks.tensor(op, "v", v, _checks.MODEL_DTYPES)
    if v.ndim < 2 or v.shape[1:].numel() == 0:
        _checks.refuse(op, "v", list(v.shape), "[B, *shape], with at least one element a latent")
    _checks.tensor(op, "v_old", v_old, _checks.MODEL_DTYPES, shape=v.shape, device=v.device)
    _checks.tensor(op, "u", u, _checks.LATENT_DTYPES, device=v.device)
    if u.shape[1:] != v.shape[1:]:
        _checks.refuse(op, "u", list(u.shape), f"[P, *shape] with the latent shape of v, {list(v.shape[1:])}")
    _checks.tensor(op, "advantage", advantage, _checks.REAL_DTYPES, shape=v.shape[:1], device=v.device)


def _items(
    op: str, B: int, P: int, pair: Sequence[int] | Tensor | None, branch: Sequence[int] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row of u and branch of each item, int64 `[B]` on the CPU."""
    if (pair is None) != (branch is None):
        missing = "pair" if pair is None else "branch"
        _checks.refuse(op, missing, None, "indices where the other of pair and branch is given")
    if pair is not None:
        return (
            _checks.integers(op, "pair", pair, length=B, limit=P),
            _checks.integers(op, "branch", branch, length=B, limit=2),
        )
    if B != 2 * P:
        _checks.refuse(op, "pair", None, f"indices, unless v has 2P = {2 * P} rows; it has {B}")
    return torch.arange(P).repeat_interleave(2), torch.arange(2).repeat(P)


def _positive(op: str, name: str, value: float) -> float:
    out = _checks.number(op, name, value)
    if out <= 0:
        _checks.refuse(op, name, out, "a number above 0")
    return out
