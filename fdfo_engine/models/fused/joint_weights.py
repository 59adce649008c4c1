"""Frozen weights of several linear layers side by side in one buffer, so that one product runs them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class JointWeights:
    """Moves the storage of `layers` into one buffer; their parameters stay the same objects, with the same values.

    What moves a parameter elsewhere later (`.to`, a new `.data`) or unfreezes it is noticed by `runs`, and the
    layers then run one by one; after a move for good, so the buffer is let go. `release` gives each parameter storage
    of its own again. With `last_apart` the last layer's output is a tensor of its own, by a second product, where the
    others' are views of one: what keeps it for a backward does not keep the others with it.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, last_apart: bool = False) -> None:
        self.layers = list(layers)
        self.last_apart = last_apart
        self.sizes = [layer.out_features for layer in layers]
        self.weight: Tensor | None = _gather([layer.weight for layer in layers])
        self.bias: Tensor | None = None if layers[0].bias is None else _gather([layer.bias for layer in layers])
        self._places = [p.data_ptr() for p in self._parameters()]

    @classmethod
    def of(cls, layers: Sequence[Any], *, last_apart: bool = False) -> JointWeights | None:
        """None unless all `layers` are plain frozen linear layers of one input size, dtype and device."""
        if not all(type(layer) is nn.Linear for layer in layers):
            return None
        kinds = {(m.in_features, m.bias is None, m.weight.dtype, m.weight.device) for m in layers}
        trained = any(p.requires_grad for layer in layers for p in layer.parameters())
        return None if trained or len(kinds) > 1 else cls(layers, last_apart=last_apart)

    def runs(self, layers: Sequence[nn.Module]) -> bool:
        """Whether `together` is what `layers` compute now: no adapter wraps them, the buffer holds them, all frozen."""
        if any(now is not then for now, then in zip(layers, self.layers, strict=True)):
            return False
        return self.holds() and not any(p.requires_grad for p in self._parameters())

    def holds(self) -> bool:
        """Whether all weights still lie in the buffer; where one does not, the buffer is let go."""
        if any(p.data_ptr() != place for p, place in zip(self._parameters(), self._places, strict=True)):
            self.weight, self.bias = None, None
        return self.weight is not None

    def together(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every layer's output for `x` `[..., K]`; differentiable in `x`, once."""
        assert self.weight is not None
        if not (x.requires_grad and torch.is_grad_enabled()):
            return _split_linear(x, self.weight, self.bias, self.sizes, self.last_apart)
        found: tuple[Tensor, ...] = _Together.apply(x, self.weight, self.bias, self.sizes, self.last_apart)
        return found

    def release(self) -> None:
        """Storage of its own for each parameter that still lies in the buffer."""
        for parameter, place in zip(self._parameters(), self._places, strict=True):
            if parameter.data_ptr() == place:
                parameter.data = parameter.data.clone()

    def _parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in (layer.weight, layer.bias) if p is not None]


class _Together(torch.autograd.Function):
    """The gradient of x is summed in the products themselves; autograd alone would join the upstream ones first."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], last_apart: bool
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight)
        ctx.sizes = sizes
        return _split_linear(x, weight, bias, sizes, last_apart)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors[0].split(ctx.sizes)
        grad = upstream[0].flatten(0, -2) @ parts[0]
        for g, weight in zip(upstream[1:], parts[1:], strict=True):
            grad.addmm_(g.flatten(0, -2), weight)
        return grad.view(*upstream[0].shape[:-1], -1), None, None, None, None


def _split_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], last_apart: bool
) -> tuple[Tensor, ...]:
    count = len(weight) - sizes[-1] if last_apart else len(weight)
    first, last = (None, None) if bias is None else (bias[:count], bias[count:])
    found: tuple[Tensor, ...] = linear(x, weight[:count], first).split(sizes[:-1] if last_apart else sizes, -1)
    return (*found, linear(x, weight[count:], last)) if last_apart else found


def _gather(parameters: Sequence[Tensor]) -> Tensor:
    rows = sum(len(p) for p in parameters)
    buffer = torch.empty(rows, *parameters[0].shape[1:], dtype=parameters[0].dtype, device=parameters[0].device)
    start = 0
    for parameter in parameters:
        part = buffer[start : start + len(parameter)]
        start += len(parameter)
        part.copy_(parameter.data)
        parameter.data = part  # the old storage is freed here, one layer at a time
    return buffer
