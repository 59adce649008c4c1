"""Cases of the linear ops: each one beside PEFT's or diffusers' module, at SD3.5-Medium's width and the miniature's.

Float32 on the CPU, bfloat16 on a GPU, where the modules run as they do under mixed precision: in bfloat16 all through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.pair_ops import Call, Case, Wrap
from fdfo_engine import ops

RANK, SCALING = 32, 2.0
SIZES = ((2, 1024, 1536), (24, 64, 96))  # batch, tokens, width: a block of SD3.5-Medium at 512 px; of the bundled model
Forward = Callable[..., Tensor]


class Contest(NamedTuple):
    """A module and the op in its place, `fused(x, backend=)`, with what each trains, and the bytes of a forward."""

    op: str
    x: Tensor
    module: Forward
    trained: list[Tensor]
    fused: Forward
    masters: list[Tensor]
    num_bytes: int


def cases(device: torch.device, *, pairs: int, rows: int) -> list[Case]:
    """All cases; the sizes are fixed, whatever `pairs` and `rows`."""
    contests = (build(device, *size) for size in SIZES for build in (_lora, _group, _feed_forward))
    return [case(contest) for contest in contests for case in (_forward, _forward_backward)]


def _forward(c: Contest) -> Case:
    """Without gradients, as in a rollout."""

    def op(backend: str) -> Tensor:
        with torch.no_grad():
            return c.fused(c.x, backend=backend)

    def plain(wrap: Wrap) -> Call:
        return torch.no_grad()(wrap(lambda: c.module(c.x)))

    return Case(f"{c.op} forward, {list(c.x.shape)}", plain, op, op, c.num_bytes, comparable=True)


def _forward_backward(c: Contest) -> Case:
    """To x and to what is trained."""
    g = torch.randn_like(c.module(c.x))

    def op(backend: str) -> Tensor:
        return torch.autograd.grad(c.fused(c.x, backend=backend), [c.x, *c.masters], g)[0]

    def plain(wrap: Wrap) -> Call:
        forward = wrap(lambda: c.module(c.x))
        return lambda: torch.autograd.grad(forward(), [c.x, *c.trained], g)[0]

    return Case(f"{c.op} forward + backward, {list(c.x.shape)}", plain, op, op, 3 * c.num_bytes, comparable=True)


def _lora(device: torch.device, *size: int) -> Contest:
    x = _activations(device, *size)
    layer = _peft(device, size[-1], x.dtype)
    projection = _projection(layer)

    def fused(x: Tensor, backend: str) -> Tensor:
        return ops.adapted_projection(x, projection, backend=backend)

    num_bytes = x.element_size() * (2 * x.numel() + size[-1] ** 2)
    return Contest("adapted_projection", x, layer, _factors(layer), fused, _masters(projection), num_bytes)


def _group(device: torch.device, *size: int) -> Contest:
    """Queries, keys and values; their sum stands for what comes after them."""
    x = _activations(device, *size)
    layers = [_peft(device, size[-1], x.dtype) for _ in range(3)]
    projections = [_projection(layer) for layer in layers]

    def plain(x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in layers)
        return q + k + v

    def fused(x: Tensor, backend: str) -> Tensor:
        ((q, k, v),) = ops.adapted_projections(x, [projections], backend=backend).streams
        return q + k + v

    trained = [factor for layer in layers for factor in _factors(layer)]
    masters = [factor for projection in projections for factor in _masters(projection)]
    num_bytes = x.element_size() * (4 * x.numel() + 3 * size[-1] ** 2)
    return Contest("adapted_projections, 3 of one x", x, plain, trained, fused, masters, num_bytes)


def _feed_forward(device: torch.device, *size: int) -> Contest:
    """Frozen."""
    from diffusers.models.attention import FeedForward

    x = _activations(device, *size)
    module = FeedForward(size[-1], activation_fn="gelu-approximate").to(device, x.dtype).requires_grad_(False)
    first, second = module.net[0].proj, module.net[2]

    def fused(x: Tensor, backend: str) -> Tensor:
        return ops.feed_forward(x, first.weight, first.bias, second.weight, second.bias, backend=backend)

    return Contest("feed_forward", x, module, [], fused, [], x.element_size() * (2 * x.numel() + 8 * size[-1] ** 2))


def _activations(device: torch.device, *shape: int) -> Tensor:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def _peft(device: torch.device, width: int, dtype: torch.dtype) -> Any:
    """PEFT's linear layer, its second factor as far from zero as the first."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(nn.Linear(width, width)))[0].to(device, dtype)
    nn.init.normal_(layer.lora_B["default"].weight, std=width**-0.5)
    return layer


def _factors(layer: Any) -> list[Tensor]:
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def _projection(layer: Any) -> ops.Projection:
    """PEFT's layer as the op takes it: the factors in float32."""
    masters = (factor.detach().float().requires_grad_() for factor in _factors(layer))
    return ops.Projection(layer.base_layer.weight, layer.base_layer.bias, ops.Adapter(*masters, SCALING))


def _masters(projection: ops.Projection) -> list[Tensor]:
    assert projection.adapter is not None
    return [projection.adapter.a, projection.adapter.b]
