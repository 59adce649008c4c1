"""Classifier-free guidance, the same in sampling and in training."""

from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch

OFFERED = ("torch",)


def guided_velocity(v: Tensor, v_uncond: Tensor | None, guidance_scale: float, *, backend: str | None = None) -> Tensor:
    """`v_uncond + w * (v - v_uncond)` in float32, rounded to the dtype of `v`; differentiable in both.

    The rounding is straight-through: gradients pass it unchanged (but for their own rounding to the inputs' dtype).

    Args:
        v: velocity with the prompt, any shape, in latent units a unit of t; float32, bfloat16 or float16.
        v_uncond: like `v`, velocity with the negative prompt; None for none.
        guidance_scale: w, without a unit, finite. With w = 1 or without `v_uncond` the result is `v` itself, not a
            copy.
        backend: None or "torch".

    Returns:
        Like `v`. Repeats bit for bit, and row by row whatever the batch.

    Raises:
        ValueError: shapes, dtypes or devices differ, or w is not finite.
        BackendUnavailableError: `backend` can't run on `v`'s device.

    Source: METHOD, 'Paired sampling' 4 and 5.
    """
    op = "guided_velocity"
    _checks.tensor(op, "v", v, _checks.MODEL_DTYPES)
    scale = _checks.number(op, "guidance_scale", guidance_scale)
    _dispatch.choose(op, OFFERED, v.device, forced=backend)
    if v_uncond is None or scale == 1.0:
        return v
    _checks.tensor(op, "v_uncond", v_uncond, (v.dtype,), shape=v.shape, device=v.device)
    return guided_velocity_reference(v, v_uncond, scale)


def guided_velocity_reference(v: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """The specification."""
    uncond = v_uncond.float()
    return (uncond + scale * (v.float() - uncond)).to(v.dtype)
