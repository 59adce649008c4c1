"""adaLN: what a block takes from time and prompt, and the second half of a block that it steers in both families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import silu

from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.linear import feed_forward_of, project
from fdfo_engine.ops import gated_residual, gated_residual_norm


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


def attend_and_feed(
    x: Tensor, out: Tensor, gate: Tensor, feed: Sequence[Tensor], module: Any, *, recompute: bool
) -> Tensor:
    """The residual stream after attention's `out` and the feed-forward `module`; `feed` are shift, scale and gate."""
    shift, scale, feed_gate = feed
    x, n = gated_residual_norm(x, out, gate, scale, shift)
    return gated_residual(x, feed_forward_of(module, n, recompute=recompute), feed_gate)


def refuse_attention_kwargs(kwargs: dict[str, Any] | None) -> None:
    """A fused block has no attention processor to hand further arguments to."""
    if kwargs:
        raise ValueError(f"fused blocks take no joint_attention_kwargs but scale; got {sorted(kwargs)}: unfuse first")
