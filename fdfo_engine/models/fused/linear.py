"""Linear layers of a diffusers block, with or without their adapter, as the engine's ops take them."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from fdfo_engine.ops import Adapter, Projection, adapted_projection


def base_of(layer: Any) -> nn.Module:
    """The linear layer itself, without its adapter."""
    base: nn.Module = layer.base_layer if isinstance(layer, LoraLinear) else layer
    return base


def projection_of(layer: Any) -> Projection:
    """What `layer` computes now: adapters may be switched off, or moved, between two calls.

    Its block has been asked whether that is all that the layer computes.
    """
    base: Any = base_of(layer)
    if base is layer:
        return Projection(layer.weight, layer.bias)
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return Projection(base.weight, base.bias)
    a, b = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    return Projection(base.weight, base.bias, Adapter(a.float(), b.float(), layer.scaling[names[0]]))


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`."""
    return adapted_projection(x, projection_of(layer))
