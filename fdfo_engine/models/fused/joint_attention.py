"""Joint attention over the streams of tokens of one diffusers attention module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fdfo_engine.models.fused.attention import attention
from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.linear import base_of, projection_of
from fdfo_engine.ops import NORM_EPS, QKV, HeadNorm, Packed, Projection, adapted_projections, is_invertible, qk_rms_norm

IMAGE = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
Rotary = tuple[Tensor, Tensor]


class Settings(NamedTuple):
    """How fused blocks run."""

    attention: str
    recompute_fc1: bool
    rehome: bool


class TokenStream:
    """What makes queries, keys and values of one kind of tokens. Layers are looked up when called: LoRA wraps them."""

    def __init__(self, module: Any, names: tuple[tuple[str, ...], tuple[str, ...]], *, rehome: bool) -> None:
        self.module = module
        self.layer_names, self.norm_names = names
        # attention keeps values for the backward, and would keep raw queries and keys in one tensor with them
        self.joint = JointWeights.of(self._base_layers(), last_apart=True) if rehome else None

    def projections(self) -> list[Projection]:
        """To queries, keys and values, as they are now."""
        return [projection_of(layer) for layer in self._layers()]

    def norm_weights(self) -> list[Tensor | None]:
        """Of the norms of queries and keys; None without a norm."""
        norms = [getattr(self.module, name, None) for name in self.norm_names]
        return [None if norm is None else norm.weight for norm in norms]

    def is_joint(self) -> bool:
        """Whether its weights lie together, so that one product is what its layers compute without adapters."""
        return self.joint is not None and self.joint.runs(self._base_layers())

    def products(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values by that product."""
        assert self.joint is not None
        return self.joint.together(x)

    def _layers(self) -> list[Any]:
        return [getattr(self.module, name) for name in self.layer_names]

    def _base_layers(self) -> list[nn.Module]:
        return [base_of(layer) for layer in self._layers()]


class JointAttention:
    """Projections, norms, packing and attention; the projections out of it are the block's."""

    def __init__(self, module: Any, settings: Settings, *, text_first: bool = False, rotary: bool = False) -> None:
        names = [IMAGE] if module.added_kv_proj_dim is None else [TEXT, IMAGE] if text_first else [IMAGE, TEXT]
        self.streams = [TokenStream(module, stream, rehome=settings.rehome) for stream in names]
        self.head_size = module.inner_dim // module.heads
        self.backend = settings.attention
        weights = [weight for stream in self.streams for weight in stream.norm_weights()]
        self.invertible = is_invertible(weights, rotary=rotary)

    @property
    def joints(self) -> list[JointWeights]:
        """Buffers that hold the weights of its projections."""
        return [stream.joint for stream in self.streams if stream.joint is not None]

    def __call__(self, *tokens: Tensor, rotary: Rotary | None = None, mask: Tensor | None = None) -> Tensor:
        """The attention's output, `[B, sum S_i, H * E]`, of the streams in order; `mask` as in `attention`."""
        projections = [stream.projections() for stream in self.streams]
        adapted = any(p.adapter is not None for of_stream in projections for p in of_stream)
        if adapted or not all(stream.is_joint() for stream in self.streams):
            q, k, v = self._adapted(tokens, projections, rotary)
        else:
            q, k, v = self._joint(tokens, rotary)
        return attention(q, k, v, backend=self.backend, mask=mask).flatten(2)

    def _adapted(
        self, tokens: Sequence[Tensor], projections: Sequence[Sequence[Projection]], rotary: Rotary | None
    ) -> list[Tensor]:  # fmt: skip
        """Queries, keys and values, `[B, sum S_i, H, E]`."""
        ended = []
        for stream, (q, k, v) in zip(self.streams, projections, strict=True):
            q_norm, k_norm = (
                HeadNorm(weight, self.head_size, NORM_EPS, rotary, self.invertible) for weight in stream.norm_weights()
            )
            ended.append([q.with_end(q_norm), k.with_end(k_norm), v.with_end(Packed())])
        packed = adapted_projections(tokens, ended).packed
        return [part.unflatten(2, (-1, self.head_size)) for part in packed]

    def _joint(self, tokens: Sequence[Tensor], rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same by one product a stream, of weights that lie together."""
        streams = [
            QKV(*stream.products(x), *stream.norm_weights()) for stream, x in zip(self.streams, tokens, strict=True)
        ]
        q, k, v = qk_rms_norm(
            streams, head_size=self.head_size, rotary=rotary, eps=NORM_EPS, invertible=self.invertible
        )  # fmt: skip
        assert v is not None
        return q, k, v
