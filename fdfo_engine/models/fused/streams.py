"""Joint attention over the streams of tokens of one diffusers attention module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fdfo_engine.models.fused.attention import attention
from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.linear import base_of, goes_on_inside, project_normed, project_streams
from fdfo_engine.ops import NORM_EPS, QKV, is_invertible, qk_rms_norm

IMAGE = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")


class Settings(NamedTuple):
    """How fused blocks run."""

    attention: str
    recompute_fc1: bool
    rehome: bool


class Stream:
    """What makes queries, keys and values of one kind of tokens. Layers are looked up when called: LoRA wraps them."""

    def __init__(self, module: Any, names: tuple[tuple[str, ...], tuple[str, ...]], *, rehome: bool) -> None:
        self.module = module
        self.layer_names, self.norm_names = names
        bases = [base_of(layer) for layer in self.layers()]
        # attention keeps values for the backward, and would keep raw queries and keys in one tensor with them
        self.joint = JointWeights.of(bases, last_apart=True) if rehome else None

    def layers(self) -> list[nn.Module]:
        """The projections to queries, keys and values, as they are now."""
        return [getattr(self.module, name) for name in self.layer_names]

    def norm_weights(self) -> list[Tensor | None]:
        """Of the norms of queries and keys; None without a norm."""
        norms = [getattr(self.module, name, None) for name in self.norm_names]
        return [None if norm is None else norm.weight for norm in norms]


class StreamAttention:
    """Projections, norms, packing and attention; the projections out of it are the block's."""

    def __init__(self, module: Any, settings: Settings, *, text_first: bool = False, rotary: bool = False) -> None:
        names = [IMAGE] if module.added_kv_proj_dim is None else [TEXT, IMAGE] if text_first else [IMAGE, TEXT]
        self.streams = [Stream(module, stream, rehome=settings.rehome) for stream in names]
        self.head_size = module.inner_dim // module.heads
        self.backend = settings.attention
        weights = [weight for stream in self.streams for weight in stream.norm_weights()]
        self.invertible = is_invertible(weights, rotary=rotary)

    @property
    def joints(self) -> list[JointWeights]:
        """Buffers that hold the weights of its projections."""
        return [stream.joint for stream in self.streams if stream.joint is not None]

    def __call__(self, *tokens: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The attention's output, `[B, sum S_i, H * E]`: the tokens of the streams in order."""
        q, k, v = self._projected(tokens, rotary)
        return attention(q, k, v, self.backend).flatten(2)

    def _projected(
        self, tokens: Sequence[Tensor], rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Queries, keys and values, `[B, sum S_i, H, E]`."""
        layers, weights = [s.layers() for s in self.streams], [s.norm_weights() for s in self.streams]
        pairs = [(q, k) for q, k in weights if q is not None and k is not None]
        every = [layer for of_stream in layers for layer in of_stream]
        if rotary is None and len(pairs) == len(weights) and goes_on_inside(every, tokens[0].device):
            return project_normed(layers, tokens, pairs, self.head_size, NORM_EPS, invertible=self.invertible)
        made, packed_v = project_streams(layers, [stream.joint for stream in self.streams], tokens)
        streams = [
            QKV(*qkv, *([] if packed_v is None else [None]), *pair) for qkv, pair in zip(made, weights, strict=True)
        ]
        q, k, v = qk_rms_norm(
            streams, head_size=self.head_size, rotary=rotary, eps=NORM_EPS, invertible=self.invertible
        )  # fmt: skip
        v = packed_v.unflatten(2, q.shape[2:]) if v is None and packed_v is not None else v
        assert v is not None
        return q, k, v
