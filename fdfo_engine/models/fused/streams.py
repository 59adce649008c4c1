"""Joint attention over the streams of tokens of one diffusers attention module."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fdfo_engine.models.fused.attention import attention
from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.linear import base_of, project_all
from fdfo_engine.ops import QKV, qk_rms_norm

IMAGE = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
EPS = 1e-6


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
        bases = [base_of(layer) for layer in self._layers()]
        self.joint = JointWeights.of(bases) if rehome else None

    def __call__(self, x: Tensor) -> QKV:
        """The projections of `x`, not yet normed."""
        norms = [getattr(self.module, name, None) for name in self.norm_names]
        return QKV(*project_all(self._layers(), x, self.joint), *(None if n is None else n.weight for n in norms))

    def _layers(self) -> list[nn.Module]:
        return [getattr(self.module, name) for name in self.layer_names]


class StreamAttention:
    """Projections, norms, packing and attention; the projections out of it are the block's."""

    def __init__(self, module: Any, settings: Settings, *, text_first: bool = False) -> None:
        names = [IMAGE] if module.added_kv_proj_dim is None else [TEXT, IMAGE] if text_first else [IMAGE, TEXT]
        self.streams = [Stream(module, stream, rehome=settings.rehome) for stream in names]
        self.head_size = module.inner_dim // module.heads
        self.backend = settings.attention

    @property
    def joints(self) -> list[JointWeights]:
        """Buffers that hold the weights of its projections."""
        return [stream.joint for stream in self.streams if stream.joint is not None]

    def __call__(self, *tokens: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Each stream's share of the attention's output, `[B, S_i, H * E]`."""
        streams = [stream(x) for stream, x in zip(self.streams, tokens, strict=True)]
        q, k, v = qk_rms_norm(streams, head_size=self.head_size, rotary=rotary, eps=EPS)
        mixed = attention(q, k, v, self.backend).flatten(2)
        return mixed.split([x.shape[1] for x in tokens], 1) if len(tokens) > 1 else (mixed,)
