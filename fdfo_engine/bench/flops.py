"""Floating-point operations of a LoRA-adapted transformer by formula: products of matrices, attention and nothing else.

A product of `[M, K]` and `[K, N]` counts 2 M K N. Attention's backward counts five products where its forward has two,
as every kernel without stored scores computes it. What needs no gradient has no backward: the modulation, the
embedders, and in the first block all that comes before an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fdfo_engine.bench.architectures import Architecture

ATTENTION_BACKWARD = 5 / 2


@dataclass(frozen=True)
class Product:
    """`[rows, inner] @ [inner, outer]`, adapted at `rank` (0: not), with what its backward has to give."""

    rows: int
    inner: int
    outer: int
    rank: int = 0
    has_backward: bool = True
    needs_input_gradient: bool = True

    @property
    def forward(self) -> int:
        """The product itself, and both of its adapter's."""
        return 2 * self.rows * (self.inner * self.outer + self.rank * (self.inner + self.outer))

    @property
    def backward(self) -> int:
        """The input's gradient through weight and adapter, and the adapter's own two gradients."""
        if not self.has_backward:
            return 0
        adapter = 2 * self.rows * self.rank * (2 * self.outer + self.inner)
        through = 2 * self.rows * self.inner * (self.outer + self.rank)
        return adapter + (through if self.needs_input_gradient else 0)


@dataclass(frozen=True)
class Attention:
    """Softmax attention of `tokens` to `tokens` at `width` over all heads."""

    tokens: int
    width: int
    has_backward: bool = True

    @property
    def forward(self) -> int:
        """Scores and their product with the values."""
        return 4 * self.tokens**2 * self.width

    @property
    def backward(self) -> float:
        """See the module."""
        return ATTENTION_BACKWARD * self.forward if self.has_backward else 0


Part = Product | Attention


@dataclass(frozen=True)
class Flops:
    """Operations a sample."""

    forward: float
    backward: float

    @property
    def training(self) -> float:
        """Forward and backward of one item."""
        return self.forward + self.backward


def flops(architecture: Architecture) -> Flops:
    """Operations of one sample of `architecture`."""
    parts = list(_flux(architecture) if architecture.is_flux else _sd3(architecture))
    return Flops(sum(part.forward for part in parts), sum(part.backward for part in parts))


def _width(architecture: Architecture) -> int:
    width: int = architecture.config["num_attention_heads"] * architecture.config["attention_head_dim"]
    return width


def _frozen(rows: int, inner: int, outer: int) -> Product:
    return Product(rows, inner, outer, has_backward=False)


def _embedders(architecture: Architecture, embeddings: int) -> Iterator[Part]:
    """Text, pooled vector, `embeddings` sinusoids; the modulation of the last norm and the last projection."""
    config, width, tokens = architecture.config, _width(architecture), architecture.image_tokens
    yield _frozen(architecture.text_tokens, config["joint_attention_dim"], width)
    yield _frozen(1, config["pooled_projection_dim"], width)
    yield _frozen(1, width, width)
    for _ in range(embeddings):
        yield _frozen(1, 256, width)
        yield _frozen(1, width, width)
    yield _frozen(1, width, 2 * width)
    patch = config.get("patch_size", 1) ** 2 * (config.get("out_channels") or config["in_channels"])
    yield _frozen(tokens, config.get("patch_size", 1) ** 2 * config["in_channels"], width)
    yield Product(tokens, width, patch)


def _sd3(architecture: Architecture) -> Iterator[Part]:
    yield from _embedders(architecture, 1)
    layers = architecture.config["num_layers"]
    for layer in range(layers):
        dual = layer in architecture.config.get("dual_attention_layers", ())
        yield from _joint(architecture, first=layer == 0, last=layer == layers - 1, dual=dual)


def _joint(architecture: Architecture, *, first: bool, last: bool = False, dual: bool = False) -> Iterator[Part]:
    """One block of both streams; the last one of SD3 drops the text behind its attention."""
    width, image, text = _width(architecture), architecture.image_tokens, architecture.text_tokens
    rank = architecture.rank
    yield _frozen(1, width, (9 if dual else 6) * width)
    yield _frozen(1, width, (2 if last else 6) * width)
    for rows in (image, image, image, text, text, text):
        yield Product(rows, width, width, rank, needs_input_gradient=not first)
    yield Attention(image + text, width)
    for rows in (image,) if last else (image, text):
        yield Product(rows, width, width, rank)
        yield Product(rows, width, 4 * width)
        yield Product(rows, 4 * width, width)
    if dual:
        yield Attention(image, width, has_backward=not first)
        yield from [Product(image, width, width, has_backward=not first)] * 4


def _flux(architecture: Architecture) -> Iterator[Part]:
    yield from _embedders(architecture, 2 if architecture.config["guidance_embeds"] else 1)
    width, rank = _width(architecture), architecture.rank
    tokens = architecture.image_tokens + architecture.text_tokens
    for layer in range(architecture.config["num_layers"]):
        yield from _joint(architecture, first=layer == 0)
    for _ in range(architecture.config["num_single_layers"]):
        yield _frozen(1, width, 3 * width)
        yield from [Product(tokens, width, width, rank)] * 3
        yield Attention(tokens, width)
        yield Product(tokens, width, 4 * width)
        yield Product(tokens, 5 * width, width)
