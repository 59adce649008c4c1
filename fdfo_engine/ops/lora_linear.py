"""A linear layer with a low-rank adapter beside its frozen weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fdfo_engine.ops import _checks, _dispatch

OFFERED = ("torch",)
MASTER_DTYPES = (torch.float32,)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    *,
    gelu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`y = x W^T + bias + scaling * (x A^T) B^T`, then tanh-GELU if `gelu`.

    Args:
        x: `[..., K]`; float32, bfloat16 or float16.
        weight: W `[N, K]`, frozen or trained, dtype of `x`.
        bias: `[N]`, dtype of `x`, or None.
        lora_a, lora_b: A `[r, K]` and B `[N, r]`, float32; None, both, for a plain linear layer.
        scaling: factor of the adapter, finite.
        gelu: applies `0.5 h (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3)))`.
        backend: None takes the fastest that runs on `x`'s device; a name of `ops.backends` forces one.

    Returns:
        `[..., N]`, dtype of `x`.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; one of `lora_a` and `lora_b` without the other.
        BackendUnavailableError: `backend` can't run on `x`'s device.
    """
    op = "lora_linear"
    check_linear(op, x, weight, bias, lora_a, lora_b)
    scaling = _checks.number(op, "scaling", scaling)
    _dispatch.choose(op, OFFERED, x.device, forced=backend)
    return lora_linear_reference(x, weight, bias, lora_a, lora_b, scaling, gelu)


def lora_linear_group(
    x: Tensor,
    linears: list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]],
    scaling: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of one `x` by each `(weight, bias, lora_a, lora_b)`."""
    return tuple(lora_linear(x, *parts, scaling, backend=backend) for parts in linears)


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    scaling: float, gelu: bool,
) -> Tensor:  # fmt: skip
    """The specification: float32 inside, one rounding of the output."""
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if lora_a is not None and lora_b is not None:
        y = y + scaling * F.linear(F.linear(x.float(), lora_a), lora_b)
    return (F.gelu(y, approximate="tanh") if gelu else y).to(x.dtype)


def check_linear(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None
) -> None:
    """Refuses what is not one linear layer with its adapter."""
    _checks.tensor(op, "x", x, _checks.MODEL_DTYPES)
    if x.ndim < 1 or x.shape[-1] == 0:
        _checks.refuse(op, "x", list(x.shape), "[..., K], K at least 1")
    _checks.tensor(op, "weight", weight, (x.dtype,), device=x.device)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or len(weight) == 0:
        _checks.refuse(op, "weight", list(weight.shape), f"[N, {x.shape[-1]}], the last axis that of x")
    if bias is not None:
        _checks.tensor(op, "bias", bias, (x.dtype,), shape=weight.shape[:1], device=x.device)
    if (lora_a is None) != (lora_b is None):
        _checks.refuse(op, "lora_a" if lora_a is None else "lora_b", None, "a tensor where the other factor is one")
    if lora_a is None or lora_b is None:
        return
    _checks.tensor(op, "lora_a", lora_a, MASTER_DTYPES, device=x.device)
    if lora_a.ndim != 2 or lora_a.shape[1] != x.shape[-1] or len(lora_a) == 0:
        _checks.refuse(op, "lora_a", list(lora_a.shape), f"[r, {x.shape[-1]}], the last axis that of x")
    _checks.tensor(op, "lora_b", lora_b, MASTER_DTYPES, shape=(len(weight), len(lora_a)), device=x.device)
