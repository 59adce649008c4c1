"""One solver step of both branches of every pair."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch, _trajectory
from fdfo_engine.ops.guided_velocity import guided_velocity

OFFERED = ("torch",)


@torch.no_grad()
def paired_step(
    x: Tensor,
    v: Tensor,
    *,
    sigma: float,
    sigma_next: float,
    gamma: float | Tensor,
    seed: int,
    pair_ids: Sequence[int] | Tensor,
    step: int,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    v_out: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Next latents: guidance, rounding to the dtype of `v`, overshoot to `r`, renoise back to s = `sigma_next`.

    `r = s / (1 + g - g*s)`; `x' = x + (r - t) * v`;
    `x_next = x' / (1 + g*r) + r * sqrt((1+g)^2 - 1) / (1 + g*r) * eps`.
    With g = 0 it is Euler, `x + (s - t) * v`, to the bit, and no noise is drawn.

    Args:
        x: latents, float32 `[P, 2, *shape]`.
        v: velocity of the model, `[P, 2, *shape]`, float32, bfloat16 or float16: noise - data, a unit of t.
        sigma: t, where `x` is; finite.
        sigma_next: s, in 0..1 and below `sigma`.
        gamma: churn of this step (gamma_{i+1}), finite and >= 0: one number, or float32 or float64 `[P]`.
        seed: the run's seed, int in 0..2^64-1.
        pair_ids: P global pair indices in 0..2^63-1, a sequence of ints or an int64 `[P]`.
        step: i >= 0, the index of this step on the grid; addresses its noise.
        v_uncond: like `v`, of the negative prompt, or None.
        guidance_scale: w of `guided_velocity`.
        v_out: like `v`, contiguous or not; receives the velocity that was used: guided and rounded.
        inplace: write the result into `x` and return `x`.
        backend: None or "torch". The noise inside takes the same choice (`philox_normal`).

    Returns:
        float32 `[P, 2, *shape]`. Not differentiable. Repeats bit for bit; a pair never depends on the others.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device.
        BackendUnavailableError: `backend` can't run on `x`'s device.

    Source: METHOD, 'Paired sampling' 3 to 5.
    """
    op = "paired_step"
    _checks.paired(op, "x", x, _checks.LATENT_DTYPES)
    _checks.tensor(op, "v", v, _checks.MODEL_DTYPES, shape=x.shape, device=x.device)
    for name, like_v in (("v_uncond", v_uncond), ("v_out", v_out)):
        if like_v is not None:
            _checks.tensor(op, name, like_v, (v.dtype,), shape=x.shape, device=x.device)
    t, s = _checks.descent(op, sigma, sigma_next)
    pairs = _checks.pair_ids(op, pair_ids, length=len(x))
    gamma_P = _checks.churn(op, "gamma", gamma, (len(x),))
    run_seed, index = _checks.seed(op, seed), _checks.step(op, step)
    _dispatch.choose(op, OFFERED, x.device, forced=backend)
    velocity = guided_velocity(v, v_uncond, guidance_scale)
    if v_out is not None:
        v_out.copy_(velocity)
    rows = _trajectory.Rows.of_pairs(pairs, run_seed, backend)
    flat = x.flatten(0, 1), velocity.flatten(0, 1)
    gamma_R = gamma_P.repeat_interleave(2)
    x_next = _trajectory.advance(rows, *flat, sigma=t, sigma_next=s, gamma=gamma_R, step=index).view(x.shape)
    return x.copy_(x_next) if inplace else x_next
