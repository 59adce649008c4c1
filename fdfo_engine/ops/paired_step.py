"""One solver step of both branches of every pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _compiled, _dispatch, _trajectory
from fdfo_engine.ops.guided_velocity import guided_velocity_reference
from fdfo_engine.ops.philox import churn_stream, key_of

OFFERED = ("triton", "cuda", "cpp", "torch")
BLOCK = 256  # counters a Triton program; not tuned on a GPU yet
INTERPRETED_BLOCK = 16384  # the interpreter takes milliseconds a program, whatever its size


@torch.no_grad()
def paired_step(  # noqa: PLR0913
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
    solver: _checks.Solver = "churn",
    backend: str | None = None,
) -> Tensor:
    """Next latents: guidance, rounding to the dtype of `v`, overshoot to `r`, renoise back to s = `sigma_next`.

    `r = s / (1 + g - g*s)`; `x' = x + (r - t) * v`;
    `x_next = x' / (1 + g*r) + r * sqrt((1+g)^2 - 1) / (1 + g*r) * eps`.
    With g = 0 it is Euler, `x + (s - t) * v`, to the bit, and no noise is drawn. Solver `antithetic` gives branch 1 the
    eps of branch 0 with the other sign. Solver `sde` takes g as a noise level instead: the Euler step of a stochastic
    differential equation, with `dt = s - t`:
    `x_next = x * (1 + g^2 dt / (2t)) + v * (1 + g^2 (1 - t) / (2t)) * dt + g * sqrt(-dt) * eps`.

    Args:
        x: latents, float32 `[P, 2, *shape]`, in latent units: those of the model, in which noise has variance 1.
        v: velocity of the model, `[P, 2, *shape]`, float32, bfloat16 or float16, in latent units a unit of t:
            noise - data.
        sigma: t, where `x` is; finite; 0 is data and 1 noise.
        sigma_next: s, in 0..1 and below `sigma`.
        gamma: churn of this step (gamma_{i+1}), without a unit, finite and >= 0: one number, or float32 or float64
            `[P]`.
        seed: the run's seed, int in 0..2^64-1.
        pair_ids: P global pair indices in 0..2^63-1, a sequence of ints or an int64 `[P]`.
        step: i >= 0, the index of this step on the grid; addresses its noise.
        v_uncond: like `v`, of the negative prompt, or None.
        guidance_scale: w of `guided_velocity`.
        v_out: like `v`, contiguous or not; receives the velocity that was used: guided and rounded. It may be `v`
            itself, and shares no memory with other arguments.
        inplace: write the result into `x` and return `x`.
        solver: what `gamma` is; the level of an `sde` keeps `1 + g^2 dt / (2t)` above 0.
        backend: None takes the fastest that runs on `x`'s device; a name of `ops.backends` forces one.

    Returns:
        float32 `[P, 2, *shape]`, in latent units. Not differentiable. Repeats bit for bit; a pair never depends on the
        others.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device; an output, `v_out` or `x` in
            place, whose elements share memory.
        BackendUnavailableError: `backend` can't run on `x`'s device.

    Source: METHOD, 'Paired sampling' 3 to 5; of the SDE Flow-GRPO, arXiv 2505.05470.
    """
    op = "paired_step"
    _checks.paired(op, "x", x, _checks.LATENT_DTYPES)
    _checks.tensor(op, "v", v, _checks.MODEL_DTYPES, shape=x.shape, device=x.device)
    for name, like_v in (("v_uncond", v_uncond), ("v_out", v_out)):
        if like_v is not None:
            _checks.tensor(op, name, like_v, (v.dtype,), shape=x.shape, device=x.device)
    if v_out is not None:
        _checks.written(op, "v_out", v_out)
    if inplace:
        _checks.written(op, "x", x)
    t, s = _checks.descent(op, sigma, sigma_next)
    pairs = _checks.pair_ids(op, pair_ids, length=len(x))
    gamma_P = _checks.churn(op, "gamma", gamma, (len(x),))
    scale = _checks.number(op, "guidance_scale", guidance_scale)
    run = _RUNS[_dispatch.choose(op, OFFERED, x.device, forced=backend)]
    chosen = _checks.solver(op, solver)
    move = _Move(
        x, v, v_uncond if scale != 1.0 else None, v_out, x if inplace else torch.empty(x.shape, device=x.device),
        scale=scale,
        coefficients=_trajectory.step_table(t, s, gamma_P, x.device, chosen), antithetic=chosen == "antithetic",
        pair_ids=pairs, step=_checks.step(op, step), seed=_checks.seed(op, seed),
    )  # fmt: skip
    run(move)
    return move.out


@dataclass(frozen=True)
class _Move:
    """One call: tensors `[P, 2, *shape]` in and out, `step_coefficients` `[P, 3]`, and what addresses the noise."""

    x: Tensor
    v: Tensor
    v_uncond: Tensor | None
    v_out: Tensor | None
    out: Tensor
    scale: float
    coefficients: Tensor
    antithetic: bool
    pair_ids: Tensor
    step: int
    seed: int


def paired_step_reference(m: _Move) -> None:
    """The specification; see `_trajectory.advance`."""
    velocity = m.v if m.v_uncond is None else guided_velocity_reference(m.v, m.v_uncond, m.scale)
    if m.v_out is not None:
        m.v_out.copy_(velocity)
    rows = _trajectory.Rows.of_pairs(m.pair_ids, m.seed, m.antithetic)
    flat, coefficients = (m.x.flatten(0, 1), velocity.flatten(0, 1)), m.coefficients.repeat_interleave(2, 0)
    m.out.copy_(_trajectory.advance(rows, *flat, coefficients=coefficients, step=m.step).view(m.x.shape))


def _by_kernel(launch: Callable[[_Move], None]) -> Callable[[_Move], None]:
    """`launch` for any strides: kernels read and write contiguous latents, and tables on the device of `x`."""

    def run(given: _Move) -> None:
        if given.x.numel() == 0:
            return
        inner = replace(
            given,
            x=_compiled.inner_contiguous(given.x, 2),
            v=_compiled.inner_contiguous(given.v, 2),
            v_uncond=_compiled.inner_contiguous(given.v_uncond, 2),
            v_out=_compiled.inner_contiguous(given.v_out, 2),
            out=_compiled.inner_contiguous(given.out, 2),
            pair_ids=_checks.moved(given.pair_ids, given.x.device),
        )
        launch(inner)
        if inner.out is not given.out:
            given.out.copy_(inner.out)
        if given.v_out is not None and inner.v_out is not None and inner.v_out is not given.v_out:
            given.v_out.copy_(inner.v_out)

    return run


@_by_kernel
def _paired_step_compiled(m: _Move) -> None:
    arguments = _compiled.arguments(
        "PairedStep", x=_compiled.strided(m.x), v=_compiled.strided(m.v), v_uncond=_compiled.strided(m.v_uncond),
        v_out=_compiled.strided(m.v_out), out=_compiled.strided(m.out), number=_compiled.NUMBERS[m.v.dtype],
        pair=m.pair_ids.data_ptr(), coefficients=m.coefficients.data_ptr(), antithetic=m.antithetic,
        guidance_scale=m.scale, pairs=len(m.x), size=_compiled.latent_size(m.x, 2), step=m.step, seed=key_of(m.seed),
    )  # fmt: skip
    _compiled.call("paired_step", m.x.device, arguments)


@_by_kernel
def _paired_step_triton(m: _Move) -> None:
    from fdfo_engine.kernels.paired_step import paired_step_kernel  # triton: only where it runs

    block, size = BLOCK if m.x.is_cuda else INTERPRETED_BLOCK, _compiled.latent_size(m.x, 2)
    uncond, v_out = m.v if m.v_uncond is None else m.v_uncond, m.v if m.v_out is None else m.v_out
    tensors = (m.x, m.v, uncond, v_out, m.out)
    strides = (stride for tensor in tensors for stride in tensor.stride()[:2])
    with torch.cuda.device_of(m.x):  # triton launches on the current device, not on the tensor's
        paired_step_kernel[(2 * len(m.x) * -(-size // (4 * block)),)](
            *tensors, m.pair_ids, m.coefficients, size, *strides, m.scale, churn_stream(m.step + 1, 0), *key_of(m.seed),
            GUIDED=m.v_uncond is not None, KEEP_V=m.v_out is not None, ANTITHETIC=m.antithetic, BLOCK=block,
            enable_fp_fusion=False,
        )  # fmt: skip


_RUNS = {
    "torch": paired_step_reference,
    "triton": _paired_step_triton,
    "cpp": _paired_step_compiled,
    "cuda": _paired_step_compiled,
}
