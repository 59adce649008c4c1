"""Linear layers of a diffusers block, with or without their adapter, on the engine's ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.ops import (
    block_backend,
    feed_forward,
    lora_linear,
    lora_linear_group,
    lora_linear_residuals,
    lora_linear_streams,
    lora_qkv,
)


class LinearParts(NamedTuple):
    """Tensors of one layer as they are now: adapters may be switched off, or moved, between two calls."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0


def base_of(layer: Any) -> nn.Module:
    """The linear layer itself, without its adapter."""
    base: nn.Module = layer.base_layer if isinstance(layer, LoraLinear) else layer
    return base


def parts_of(layer: Any) -> LinearParts:
    """The tensors that `layer` computes with now; its block has been asked whether they are all that it computes."""
    base: Any = base_of(layer)
    if base is layer:
        return LinearParts(base.weight, base.bias)
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return LinearParts(base.weight, base.bias)
    a, b = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    return LinearParts(base.weight, base.bias, a.float(), b.float(), layer.scaling[names[0]])


def project(layer: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor:
    """`layer(x)`, then tanh-GELU if `gelu`."""
    return lora_linear(x, *parts_of(layer), gelu=gelu)


def project_all(layers: Sequence[nn.Module], x: Tensor, joint: JointWeights | None) -> tuple[Tensor, ...]:
    """`layer(x)` of each; in one product where their weights lie in one buffer and no adapter is on."""
    parts = [parts_of(layer) for layer in layers]
    if joint is not None and all(p.lora_a is None for p in parts) and joint.runs([base_of(layer) for layer in layers]):
        return joint.together(x)
    scalings = _scalings(parts)
    if len(scalings) > 1:
        return tuple(lora_linear(x, *p) for p in parts)
    return lora_linear_group(x, [p[:4] for p in parts], scalings[0])


def project_streams(
    streams: Sequence[Sequence[nn.Module]], joints: Sequence[JointWeights | None], tokens: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, ...]], Tensor | None]:
    """Queries, keys and values of each stream; where one call makes those of several, their values come packed."""
    parts = [[parts_of(layer) for layer in layers] for layers in streams]
    scalings = _scalings([p for stream in parts for p in stream])
    if len(scalings) > 1 or all(p.lora_a is None for stream in parts for p in stream):
        each = zip(streams, tokens, joints, strict=True)
        return [project_all(layers, x, joint) for layers, x, joint in each], None
    linears = [[p[:4] for p in stream] for stream in parts]
    return lora_linear_streams(tokens, linears, scalings[0], packed=len(tokens) > 1)


def project_parts(layers: Sequence[nn.Module], x: Tensor, tokens: Sequence[int]) -> list[Tensor]:
    """`layer(part)` of the streams of `tokens` that lie in x one after the other; it may hold more than that."""
    parts = [parts_of(layer) for layer in layers]
    scalings = _scalings(parts)
    if len(scalings) > 1:
        split = x.split([*tokens, x.shape[1] - sum(tokens)], 1)[:-1]
        return [lora_linear(part, *p) for part, p in zip(split, parts, strict=True)]
    return [y for (y,) in lora_linear_streams(x, [[p[:4]] for p in parts], scalings[0], tokens=tokens)[0]]


def goes_on_inside(layers: Sequence[nn.Module], device: torch.device) -> bool:
    """Whether what follows these layers is computed inside their product: a residual's sum, norms of heads.

    It is by Triton, where some layer has an adapter: without one the product is left to a library. With gradients or
    without, so that training rounds where the rollout did.
    """
    parts = [parts_of(layer) for layer in layers]
    adapted = any(p.lora_a is not None for p in parts) and len(_scalings(parts)) == 1
    return adapted and block_backend(device) == "triton"


def project_residuals(
    layers: Sequence[nn.Module], x: Tensor, residuals: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """`residual + gate * layer(part)` of each `(residual, gate)`, whose parts lie in x one after the other."""
    parts = [parts_of(layer) for layer in layers]
    return lora_linear_residuals(x, [p[:4] for p in parts], _scalings(parts)[0], residuals)


def project_normed(
    streams: Sequence[Sequence[nn.Module]], tokens: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]],
    head_size: int, eps: float, *, invertible: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values of each stream, the first two normed, packed."""
    parts = [[parts_of(layer) for layer in layers] for layers in streams]
    scaling = _scalings([p for layers in parts for p in layers])[0]
    linears = [[p[:4] for p in layers] for layers in parts]
    return lora_qkv(tokens, linears, weights, scaling, head_size=head_size, eps=eps, invertible=invertible)


def _scalings(parts: Sequence[LinearParts]) -> list[float]:
    """Of the adapters: different ones, at least one."""
    return list({p.scaling for p in parts if p.lora_a is not None}) or [1.0]


def feed_forward_of(module: Any, x: Tensor, *, recompute: bool) -> Tensor:
    """diffusers' `FeedForward` with tanh-GELU; `recompute` keeps its input alone for the backward."""
    up, down = module.net[0].proj, module.net[2]
    first, second = parts_of(up), parts_of(down)
    if first.lora_a is None and second.lora_a is None:
        return feed_forward(x, *first[:2], *second[:2], recompute=recompute)
    return _kept(lambda x: project(down, project(up, x, gelu=True)), x, recompute=recompute)


def feed_forward_residual(module: Any, x: Tensor, residual: Tensor, gate: Tensor, *, recompute: bool) -> Tensor:
    """`residual + gate * feed_forward_of(module, x)`, added inside the second product."""
    up, down = module.net[0].proj, module.net[2]

    def run(x: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
        return project_residuals([down], project(up, x, gelu=True), [(residual, gate)])[0]

    return _kept(run, x, residual, gate, recompute=recompute)


def _kept(run: Callable[..., Tensor], *tensors: Tensor, recompute: bool) -> Tensor:
    """`run(*tensors)`; with `recompute` the backward runs it again, and these tensors alone are kept for it."""
    if not (recompute and torch.is_grad_enabled()):
        return run(*tensors)
    found: Tensor = checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)
    return found
