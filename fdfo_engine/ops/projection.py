"""What `adapted_projections` is told of a linear layer: its weight, its adapter, and what follows its product.

Each end has its formula as `reference`, in float32, of the projection y `[B, S, N]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fdfo_engine.ops._checks import NORM_EPS
from fdfo_engine.ops.gated_residual_norm import Residual


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA: adds `scale * (x A^T) B^T`; A `[r, K]` and B `[N, r]`, float32, as are their gradients."""

    a: Tensor
    b: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Gelu:
    """`0.5 y (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3)))`."""

    def reference(self, y: Tensor) -> Tensor:
        """The formula."""
        return functional.gelu(y, approximate="tanh")


@dataclass(frozen=True, eq=False)
class IntoResidual:
    """`residual + gate * y`: residual `[B, S, N]`, strides of B and S any, and gate `[B, N]`, dtype of x."""

    residual: Tensor
    gate: Tensor

    def reference(self, y: Tensor) -> Tensor:
        """The formula."""
        return self.residual.float() + self.gate.float()[:, None] * y


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """Queries or keys: `qk_rms_norm` of heads of `size` columns, packed with the other streams' along tokens.

    `weight` `[size]`, float32 or dtype of x, or None, which norms nothing; `rotary`, `eps` and `invertible` as in
    `qk_rms_norm`.
    """

    weight: Tensor | None
    size: int
    eps: float = NORM_EPS
    rotary: tuple[Tensor, Tensor] | None = None
    invertible: bool = False

    def reference(self, y: Tensor) -> Tensor:
        """The norm; positions and packing are `qk_rms_norm`'s."""
        if self.weight is None:
            return y
        heads: Tensor = y.unflatten(2, (-1, self.size))
        rstd = torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.eps)
        return (heads * rstd * self.weight.float()).flatten(2)


@dataclass(frozen=True, eq=False)
class Packed:
    """Packed with the other streams' along tokens: values."""

    def reference(self, y: Tensor) -> Tensor:
        """Of one stream."""
        return y


End = Gelu | IntoResidual | HeadNorm | Packed
PACKING = (HeadNorm, Packed)


class Operands(NamedTuple):
    """The tensors of one projection, or of each of them a flag, or its gradient; None where there is none."""

    weight: Any = None
    bias: Any = None
    lora_a: Any = None
    lora_b: Any = None
    residual: Any = None
    gate: Any = None
    norm_weight: Any = None


@dataclass(frozen=True, eq=False)
class Projection:
    """`y = x W^T + bias`, plus the adapter's product, then the end. W is `[N, K]`, the bias `[N]`, dtype of x."""

    weight: Tensor
    bias: Tensor | None = None
    adapter: Adapter | None = None
    end: End | None = None

    @property
    def lora_a(self) -> Tensor | None:
        """A of the adapter; None without one."""
        return None if self.adapter is None else self.adapter.a

    @property
    def lora_b(self) -> Tensor | None:
        """B of the adapter; None without one."""
        return None if self.adapter is None else self.adapter.b

    @property
    def scale(self) -> float:
        """Of the adapter; 1 without one."""
        return 1.0 if self.adapter is None else self.adapter.scale

    @property
    def rank(self) -> int:
        """Of the adapter; 0 without one."""
        return 0 if self.adapter is None else self.adapter.a.shape[0]

    @property
    def width(self) -> int:
        """N. Cheaper than the length of W, which torch takes a Python function for."""
        return self.weight.shape[0]

    def with_end(self, end: End | None) -> Projection:
        """The same projection with this end. Cheaper than `replace`, which looks at every field."""
        return Projection(self.weight, self.bias, self.adapter, end)

    def operands(self) -> Operands:
        """Its tensors."""
        tensors = Operands(self.weight, self.bias, self.lora_a, self.lora_b)
        if isinstance(self.end, IntoResidual):
            return tensors._replace(residual=self.end.residual, gate=self.end.gate)
        if isinstance(self.end, HeadNorm):
            return tensors._replace(norm_weight=self.end.weight)
        return tensors

    def with_operands(self, given: Operands) -> Projection:
        """The same projection with these tensors."""
        adapter, end = self.adapter, self.end
        if adapter is not None:
            adapter = replace(adapter, a=given.lora_a, b=given.lora_b)
        if isinstance(end, IntoResidual):
            end = IntoResidual(given.residual, given.gate)
        elif isinstance(end, HeadNorm):
            end = replace(end, weight=given.norm_weight)
        return Projection(given.weight, given.bias, adapter, end)


class Projected(NamedTuple):
    """What `adapted_projections` returns."""

    streams: list[list[Tensor]]
    """Of each stream its plain projections, and those with `Gelu`, in order: `[B, S_i, N]`."""
    packed: list[Tensor]
    """Those that are packed along tokens, `[B, sum S_i, N]`: the first of each stream, then the second ones, ..."""
    residuals: list[Residual]
    """Those with `IntoResidual`, stream by stream."""
