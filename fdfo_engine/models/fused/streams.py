"""Joint attention over the streams of tokens of one diffusers attention module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fdfo_engine.models.fused.attention import attention
from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.linear import base_of, project_all
from fdfo_engine.ops import QKV, qk_rms_norm


class Settings(NamedTuple):
    """How fused blocks run."""

    attention: str
    recompute_fc1: bool
    rehome: bool


class Stream:
    """What makes queries, keys and values of one kind of tokens."""

    def __init__(self, layers: Sequence[nn.Module], norms: Sequence[Any], rehome: bool) -> None:
        self.layers = list(layers)
        self.norms = list(norms)
        bases = [base_of(layer) for layer in layers]
        self.joint = JointWeights(bases) if rehome and not JointWeights.refuses(bases) else None  # type: ignore[arg-type]

    @property
    def eps(self) -> float | None:
        """Of the norms, where there are any."""
        return next((norm.eps for norm in self.norms if norm is not None), None)

    def __call__(self, x: Tensor) -> QKV:
        """The projections of `x`, not yet normed."""
        weights = [None if norm is None else norm.weight for norm in self.norms]
        return QKV(*project_all(self.layers, x, self.joint), *weights)


class StreamAttention:
    """Projections, norms, packing and attention; the projections out of it are the block's."""

    def __init__(self, module: Any, settings: Settings, *, text_first: bool = False) -> None:
        image = Stream(
            (module.to_q, module.to_k, module.to_v), (module.norm_q, module.norm_k), settings.rehome
        )  # fmt: skip
        self.streams = [image]
        if module.added_kv_proj_dim is not None:
            added = (module.add_q_proj, module.add_k_proj, module.add_v_proj)
            text = Stream(added, (module.norm_added_q, module.norm_added_k), settings.rehome)
            self.streams = [text, image] if text_first else [image, text]
        self.head_size = module.inner_dim // module.heads
        self.eps = next((s.eps for s in self.streams if s.eps is not None), 1e-6)
        self.backend = settings.attention

    @property
    def joints(self) -> list[JointWeights]:
        """Buffers that hold the weights of its projections."""
        return [stream.joint for stream in self.streams if stream.joint is not None]

    def __call__(self, *tokens: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Each stream's share of the attention's output, `[B, S_i, H * E]`."""
        streams = [stream(x) for stream, x in zip(self.streams, tokens, strict=True)]
        q, k, v = qk_rms_norm(streams, head_size=self.head_size, rotary=rotary, eps=self.eps)
        mixed = attention(q, k, v, self.backend).flatten(2)
        return mixed.split([x.shape[1] for x in tokens], 1) if len(tokens) > 1 else (mixed,)
