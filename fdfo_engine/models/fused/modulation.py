"""adaLN: what a block takes from time and prompt, and the second half of a block that it steers in both families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import silu

from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.linear import feed_forward_of, project
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


class Attended(NamedTuple):
    """A stream before its attention's gated output is added, and its feed-forward with shift, scale and gate."""

    x: Tensor
    out: Tensor
    gate: Tensor
    feed: Sequence[Tensor]
    module: Any


def attend_and_feed(streams: Sequence[Attended], *, recompute: bool) -> list[Residual]:
    """The residual streams after attention and feed-forward."""
    normed = gated_residual_norms([NormStream(s.x, s.feed[1], s.feed[0], s.out, s.gate) for s in streams])
    return [
        Residual(x, feed_forward_of(s.module, n, recompute=recompute), s.feed[2])
        for (x, n), s in zip(normed, streams, strict=True)
    ]


def refuse_attention_kwargs(kwargs: dict[str, Any] | None) -> None:
    """A fused block has no attention processor to hand further arguments to."""
    if kwargs:
        raise ValueError(f"fused blocks take no joint_attention_kwargs but scale; got {sorted(kwargs)}: unfuse first")
