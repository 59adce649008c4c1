"""Gradients through a float16 network, which ends at 6e-8: those of a loss that is a mean would vanish in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LARGEST = 64.0
"""What the largest gradient of a velocity is brought to, up to a factor of 2: float16 ends at 65504 and at 6e-8."""


class GradientScale:
    """Multiplies gradients as they enter a float16 network, and divides those of its float32 parameters by the same.

    The factor is a power of two, chosen in each backward pass on the device: no host waits for it, and it changes no
    bit of a gradient that float16 would have held. What overflows on its way is not finite, and the step is skipped.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._inverse = torch.ones((), device=device)
        for parameter in parameters:
            parameter.register_hook(self._divided)

    def widened(self, velocity: Tensor) -> Tensor:
        """`velocity` in float32, through which gradients go back multiplied."""
        wide: Tensor = _Widen.apply(velocity, self._inverse)
        return wide

    def _divided(self, gradient: Tensor) -> Tensor:
        if gradient.is_cuda and torch.cuda.is_current_stream_capturing():
            return gradient  # what a graph gives is divided as it comes out
        return gradient * self._inverse


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, velocity: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse, ctx.dtype = inverse, velocity.dtype
        return velocity.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        largest = gradient.abs().amax()
        exponent = torch.where(largest > 0, LARGEST / largest, 1.0).log2().floor()
        ctx.inverse.copy_(torch.exp2(-exponent))
        return (gradient * torch.exp2(exponent)).to(ctx.dtype), None
