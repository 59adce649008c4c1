"""adaLN: what a block takes from time and prompt, and the second half of a block that it steers in both families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import silu

from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.linear import (
    feed_forward_of,
    feed_forward_residual,
    goes_on_inside,
    project,
    project_parts,
    project_residuals,
)
from fdfo_engine.ops import NormStream, gated_residual, gated_residual_norms


class Modulations:
    """The rows of scales, shifts and gates of all norms, by one product where their frozen weights lie together."""

    def __init__(self, norms: Sequence[Any], *, rehome: bool) -> None:
        self.norms = list(norms)
        self.joint = JointWeights.of([norm.linear for norm in norms]) if rehome else None

    def __call__(self, temb: Tensor) -> list[Tensor | None]:
        """A row `[B, n * D]` a norm, in their order; None where each norm has to make its own."""
        if self.joint is None or not self.joint.runs([norm.linear for norm in self.norms]):
            return [None] * len(self.norms)
        return list(self.joint.together(silu(temb)))


def modulation_of(norm: Any, temb: Tensor, row: Tensor | None) -> Tensor:
    """The row of one norm, if it isn't made yet."""
    return project(norm.linear, silu(temb)) if row is None else row


class Residual(NamedTuple):
    """The residual stream `x + gate * y` of a block's end, not yet summed: the next norm does that on its way."""

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None

    def to_norm(self, scale: Tensor, shift: Tensor, **second: Tensor) -> NormStream:
        """What `gated_residual_norms` takes for the sum and its norm, modulated, once or twice."""
        return NormStream(self.x, scale, shift, self.y, self.gate, **second)

    def joined(self) -> Tensor:
        """The sum."""
        return self.x if self.y is None or self.gate is None else gated_residual(self.x, self.y, self.gate)


def attention_outputs(layers: Sequence[Any], mixed: Tensor, streams: Sequence[tuple[Tensor, Tensor]]) -> list[Residual]:
    """`x + gate * layer(part)` of each `(x, gate)`; the attention's output `mixed` holds their parts in order."""
    if goes_on_inside(layers, mixed.device):
        return [Residual(x) for x in project_residuals(layers, mixed, streams)]
    outs = project_parts(layers, mixed, [x.shape[1] for x, _ in streams])
    return [Residual(x, out, gate) for (x, gate), out in zip(streams, outs, strict=True)]


class Attended(NamedTuple):
    """A stream after its attention, and its feed-forward with shift, scale and gate."""

    residual: Residual
    feed: Sequence[Tensor]
    module: Any


def attend_and_feed(streams: Sequence[Attended], *, recompute: bool) -> list[Residual]:
    """The residual streams after attention and feed-forward."""
    normed = gated_residual_norms([s.residual.to_norm(s.feed[1], s.feed[0]) for s in streams])
    return [_fed(s.module, x, n, s.feed[2], recompute=recompute) for (x, n), s in zip(normed, streams, strict=True)]


def _fed(module: Any, x: Tensor, n: Tensor, gate: Tensor, *, recompute: bool) -> Residual:
    """`x + gate * feed_forward(n)`."""
    if goes_on_inside([module.net[2]], x.device):
        return Residual(feed_forward_residual(module, n, x, gate, recompute=recompute))
    return Residual(x, feed_forward_of(module, n, recompute=recompute), gate)
