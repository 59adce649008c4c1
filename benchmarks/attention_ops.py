"""Cases of `qk_rms_norm`: each beside the code that diffusers runs, with its `RMSNorm` and `apply_rotary_emb`.

SD3.5-Medium's attention at 512 x 512, 1,024 image and 205 text tokens; the weights of the norms are frozen, as LoRA
leaves them. What plain code returns lies `[B, H, S, E]`, as its attention takes it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.pair_ops import Call, Case, Wrap
from fdfo_engine import ops
from fdfo_engine.bench.architectures import CLIP_TOKENS, t5_tokens

IMAGE_TOKENS, TEXT_TOKENS = 1024, CLIP_TOKENS + t5_tokens("sd35m_pickscore")
EPS = 1e-6


class Sizes(NamedTuple):
    """Of a batch; `tokens` has one entry a stream."""

    batch: int
    tokens: tuple[int, ...]
    heads: int
    head_size: int

    @property
    def elements(self) -> int:
        return self.batch * sum(self.tokens) * self.heads * self.head_size

    def __str__(self) -> str:
        return f"[{self.batch}, {'+'.join(map(str, self.tokens))}, {self.heads}, {self.head_size}]"


SINGLE = Sizes(2, (IMAGE_TOKENS,), 24, 64)
JOINT = Sizes(2, (IMAGE_TOKENS, TEXT_TOKENS), 24, 64)
SHAPES_MODEL = Sizes(24, (64, 12), 3, 32)


def cases(device: torch.device) -> list[Case]:
    """All cases."""
    make = functools.partial(_case, device)
    both = (torch.bfloat16, torch.float32)
    return [
        *(make(SINGLE, dtype) for dtype in both),
        *(make(JOINT, dtype) for dtype in both),
        make(JOINT, torch.bfloat16, rotary=True),
        *(make(JOINT, dtype, backward=True) for dtype in both),
        make(JOINT, torch.bfloat16, rotary=True, backward=True),
        make(SHAPES_MODEL, torch.float32),
        make(SHAPES_MODEL, torch.float32, backward=True),
    ]


def _case(
    device: torch.device, sizes: Sizes, dtype: torch.dtype, *, rotary: bool = False, backward: bool = False
) -> Case:
    streams = [_stream(device, sizes, count, dtype, backward) for count in sizes.tokens]
    angles = torch.rand(sum(sizes.tokens), sizes.head_size // 2, device=device).repeat_interleave(2, 1) * 6.28
    tables = (angles.cos(), angles.sin()) if rotary else None
    leaves = [x for stream in streams for x in stream[:3]]
    upstream = [torch.randn_like(out) for out in _plain(streams, sizes, tables)] if backward else []

    def plain(wrap: Wrap) -> Call:
        wrapped = wrap(lambda: _plain(streams, sizes, tables))
        if backward:
            return lambda: torch.autograd.grad(wrapped(), leaves, upstream)[0]
        return lambda: wrapped()[0].transpose(1, 2)

    def op(backend: str) -> Any:
        packed = ops.qk_rms_norm(streams, head_size=sizes.head_size, rotary=tables, eps=EPS, backend=backend)
        if not backward:
            return packed[0]
        return torch.autograd.grad(packed, leaves, [g.transpose(1, 2) for g in upstream])[0]

    return Case(_name(sizes, dtype, rotary, backward), plain, op, op, _bytes(sizes, dtype, backward), comparable=True)


def _stream(device: torch.device, sizes: Sizes, tokens: int, dtype: torch.dtype, requires_grad: bool) -> ops.QKV:
    shape = sizes.batch, tokens, sizes.heads * sizes.head_size
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_(requires_grad) for _ in range(3))
    return ops.QKV(q, k, v, *(1 + 0.1 * torch.randn(2, sizes.head_size, device=device)).to(dtype))


def _plain(streams: list[ops.QKV], sizes: Sizes, tables: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """q, k and v, `[B, H, S, E]`: what an attention processor of diffusers does before it calls the attention."""
    from diffusers.models.embeddings import apply_rotary_emb

    packed = []
    for kind in range(3):
        parts = [s[kind].view(sizes.batch, -1, sizes.heads, sizes.head_size).transpose(1, 2) for s in streams]
        if kind < 2:
            parts = [_rms_norm(x, s[3 + kind]) for x, s in zip(parts, streams, strict=True)]
        x = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        packed.append(x if tables is None or kind == 2 else apply_rotary_emb(x, tables))
    return packed


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`diffusers.models.normalization.RMSNorm.forward`."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    return (x.to(weight.dtype) if weight.dtype != torch.float32 else x) * weight


def _name(sizes: Sizes, dtype: torch.dtype, rotary: bool, backward: bool) -> str:
    what = f"qk_rms_norm{', rotary' if rotary else ''}, {'forward + backward' if backward else 'forward'}"
    return f"{what}, {str(dtype).removeprefix('torch.')}, {sizes}"


def _bytes(sizes: Sizes, dtype: torch.dtype, backward: bool) -> int:
    """q, k and, where streams are packed, v: read and written; in the backward their gradients, and q and k again."""
    kinds = 3 if len(sizes.tokens) > 1 else 2
    return sizes.elements * dtype.itemsize * (2 * kinds + (2 * kinds + 2 if backward else 0))
