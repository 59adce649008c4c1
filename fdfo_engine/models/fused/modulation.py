"""adaLN: what a block takes from time and prompt, and the second half of a block that it steers in both families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import silu

from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.linear import feed_forward_of, project
from fdfo_engine.ops import gated_residual, gated_residual_norm, layer_norm_modulate


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

    def normed(self, scale: Tensor, shift: Tensor, **second: Any) -> tuple[Tensor, ...]:
        """The sum and its norm, modulated, once or twice."""
        if self.y is not None and self.gate is not None:
            return gated_residual_norm(self.x, self.y, self.gate, scale, shift, **second)
        found: Any = layer_norm_modulate(self.x, scale, shift, **second)
        return (self.x, *found) if second else (self.x, found)

    def joined(self) -> Tensor:
        """The sum."""
        return self.x if self.y is None or self.gate is None else gated_residual(self.x, self.y, self.gate)


def attend_and_feed(
    x: Tensor, out: Tensor, gate: Tensor, feed: Sequence[Tensor], module: Any, *, recompute: bool
) -> Residual:
    """The residual stream after attention's `out` and the feed-forward `module`; `feed` are shift, scale and gate."""
    shift, scale, feed_gate = feed
    x, n = gated_residual_norm(x, out, gate, scale, shift)
    return Residual(x, feed_forward_of(module, n, recompute=recompute), feed_gate)


def refuse_attention_kwargs(kwargs: dict[str, Any] | None) -> None:
    """A fused block has no attention processor to hand further arguments to."""
    if kwargs:
        raise ValueError(f"fused blocks take no joint_attention_kwargs but scale; got {sorted(kwargs)}: unfuse first")
