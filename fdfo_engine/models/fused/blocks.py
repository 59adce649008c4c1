"""What the blocks of all families are made of, beside their attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from fdfo_engine.models.fused.linear import projection_of
from fdfo_engine.models.fused.modulation import Modulation
from fdfo_engine.ops import (
    Gelu,
    IntoResidual,
    NormStream,
    Residual,
    adapted_projection,
    adapted_projections,
    current_chooser,
    feed_forward,
    gated_residual_norms,
    under,
)

Hidden = Tensor | Residual
"""Tokens between two blocks: a Residual may hold a block's last gated output unsummed, for the next norm."""
T = TypeVar("T")


def as_residual(hidden: Hidden) -> Residual:
    """The residual stream of a block's input."""
    return hidden if isinstance(hidden, Residual) else Residual(hidden)


def like_input(stream: Residual, given: Hidden) -> Hidden:
    """A block's output in the form of its input: a tensor for diffusers, a Residual for a fused transformer."""
    return stream if isinstance(given, Residual) else stream.joined()


def normed(stream: Residual, first: Modulation, *second: Modulation) -> NormStream:
    """The stream on its way through a norm with one modulation, or two of them side by side."""
    more = {"scale2": second[0].scale, "shift2": second[0].shift} if second else {}
    return stream.to_norm(first.scale, first.shift, **more)


class Out(NamedTuple):
    """A layer that leads back into the residual stream x, through the gate of each sample."""

    layer: nn.Module
    x: Tensor
    gate: Tensor | None


def into_residuals(mixed: Tensor, outs: Sequence[Out]) -> list[Residual]:
    """`x + gate * layer(part)` of each; their parts lie in `mixed` one after the other, which may hold more."""
    projections = []
    for layer, x, gate in outs:
        assert gate is not None
        projections.append([projection_of(layer).with_end(IntoResidual(x, gate))])
    return adapted_projections(mixed, projections, tokens=[out.x.shape[1] for out in outs]).residuals


class Fed(NamedTuple):
    """A residual stream before its feed-forward `module`."""

    stream: Residual
    modulation: Modulation
    module: nn.Module


def feed(streams: Sequence[Fed], *, recompute: bool) -> list[Residual]:
    """`x + gate * module(norm(x))` of each stream; with `recompute` the module's wide half is not kept."""
    norms = gated_residual_norms([normed(s.stream, s.modulation) for s in streams])
    return [_fed(s.module, x, n, s.modulation.gate, recompute) for s, (x, n) in zip(streams, norms, strict=True)]


def _fed(module: Any, x: Tensor, n: Tensor, gate: Tensor | None, recompute: bool) -> Residual:
    """`x + gate * module(n)` of diffusers' `FeedForward` with tanh-GELU."""
    up, down = projection_of(module.net[0].proj), projection_of(module.net[2])
    if up.adapter is None and down.adapter is None:
        return Residual(x, feed_forward(n, up.weight, up.bias, down.weight, down.bias, recompute=recompute), gate)

    def run(n: Tensor, x: Tensor, gate: Tensor) -> Residual:
        return into_residuals(gelu_of(module.net[0].proj, n), [Out(module.net[2], x, gate)])[0]

    return kept(run, n, x, gate, recompute=recompute)


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """tanh-GELU of `layer(x)`."""
    return adapted_projection(x, projection_of(layer).with_end(Gelu()))


def kept(run: Callable[..., T], *tensors: Tensor | None, recompute: bool) -> T:
    """`run(*tensors)`; with `recompute` the backward runs it again, and these tensors alone are kept for it."""
    if not (recompute and torch.is_grad_enabled()):
        return run(*tensors)
    # where the backward calls it again, no switch is around it that would say whom its ops ask
    found: T = checkpoint(under, current_chooser(), run, *tensors, use_reentrant=False, preserve_rng_state=False)
    return found


def last_tokens(stream: Residual, first: int) -> Residual:
    """The tokens of `stream` from `first` on."""
    return Residual(stream.x[:, first:], None if stream.y is None else stream.y[:, first:], stream.gate)


def between_blocks(model: Any, *streams: Tensor, clips_half: bool = False) -> list[Hidden]:
    """The tokens as the first block takes them: Residuals, whose last sum is left to each next norm.

    Tensors where a checkpoint would keep both addends of such a sum; and in float16, if diffusers clips sums there.
    """
    if is_checkpointed(model) or (clips_half and streams[0].dtype == torch.float16):
        return list(streams)
    return [Residual(x) for x in streams]


def within_half(hidden: Hidden) -> Hidden:
    """Clipped to what float16 holds, as diffusers does, where that is the dtype; Residuals are of others."""
    if isinstance(hidden, Residual) or hidden.dtype != torch.float16:
        return hidden
    return hidden.clip(-65504, 65504)


def is_checkpointed(model: Any) -> bool:
    """Whether the backward computes blocks again."""
    return bool(torch.is_grad_enabled() and model.gradient_checkpointing)


def run_block(model: Any, block: Any, *arguments: Any) -> Any:
    """`block(*arguments)`, checkpointed where the model says so."""
    if is_checkpointed(model):
        return model._gradient_checkpointing_func(block, *arguments)
    return block(*arguments)


def final_layer(model: Any, hidden: Hidden, temb: Tensor, row: Tensor | None) -> Tensor:
    """The last norm and projection, whose layers are called as modules: ZeRO-3 gathers them in the call."""
    scale, shift = (model.norm_out.linear(silu(temb)) if row is None else row).chunk(2, 1)
    ((_, n),) = gated_residual_norms([as_residual(hidden).to_norm(scale, shift)])
    out: Tensor = model.proj_out(n)
    return out
