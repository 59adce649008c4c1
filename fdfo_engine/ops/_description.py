"""A whole call of `adapted_projections`: what backends are asked about, and compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from fdfo_engine.ops.projection import PACKING, IntoResidual, Operands, Projection


class Arguments(NamedTuple):
    """The tensors of a call, or of each of them a flag, or its gradient."""

    inputs: list[Any]
    operands: list[list[Operands]]
    """Of each projection of each stream."""


class Outputs(NamedTuple):
    """What the products of a call are written into, or of each of these a gradient, or what its end left."""

    streams: list[list[Any]]
    """Of each stream those that stay with it."""
    packed: list[Any]
    """Those that are packed along tokens."""
    sums: list[Any]
    """Residual streams, summed."""


class Computed(NamedTuple):
    """What a backend's `forward` returns."""

    outputs: Outputs
    beside: Outputs
    """What an end left for its backward: what GELU was taken of, or 1 / rms `[B, sum S_i, heads]` of a norm."""
    rank_products: list[Tensor | None]
    """`x A^T` of each stream's adapters side by side, `[B * S_i, ranks]`, where they were made."""


class Kept(NamedTuple):
    """What the backward of a call reads."""

    arguments: Arguments
    rank_products: list[Tensor | None]
    beside: Outputs
    outputs: Outputs
    """Those that went through a norm inside their product."""


@dataclass(frozen=True, eq=False)
class Description:
    """The projections of each stream of tokens, and what they are taken of."""

    inputs: Sequence[Tensor]
    """x `[B, S_i, K]` of each stream, or one alone that holds all of them if `shared`."""
    tokens: Sequence[int]
    """S_i of each stream."""
    shared: bool
    projections: Sequence[Sequence[Projection]]
    """At least one a stream."""

    def every(self) -> Iterator[Projection]:
        """All projections, stream by stream."""
        for of_stream in self.projections:
            yield from of_stream

    @property
    def adapted(self) -> bool:
        """Whether some projection has an adapter."""
        return any(p.adapter is not None for p in self.every())

    def arguments(self) -> Arguments:
        """Its tensors."""
        return Arguments(list(self.inputs), [[p.operands() for p in of_stream] for of_stream in self.projections])

    def with_arguments(self, given: Arguments) -> Description:
        """The same call of these tensors."""
        projections = [
            [p.with_operands(operands) for p, operands in zip(of_stream, of_given, strict=True)]
            for of_stream, of_given in zip(self.projections, given.operands, strict=True)
        ]
        return replace(self, inputs=given.inputs, projections=projections)

    def by_stream(self, inputs: Sequence[Any]) -> list[Any]:
        """The part of each stream of its x, or of the gradients of x."""
        if not self.shared:
            return list(inputs)
        return [None] * len(self.tokens) if inputs[0] is None else stream_parts(inputs[0], self.tokens)

    def outline(self) -> Outputs:
        """Where outputs belong, with None for each of them."""
        streams, packed, sums = [], list[None](), list[None]()
        for of_stream in self.projections:
            packing = packed_of(of_stream)
            residual = [p for p in of_stream if isinstance(p.end, IntoResidual)]
            streams.append([None] * (len(of_stream) - len(packing) - len(residual)))
            packed = [None] * len(packing)
            sums += [None] * len(residual)
        return Outputs(streams, packed, sums)

    def by_projection(self, outputs: Outputs) -> list[list[Any]]:
        """Of each projection of each stream its output; of a packed one the part of that stream."""
        found, sums = [], iter(outputs.sums)
        parts = [
            [None] * len(self.tokens) if t is None else t.split_with_sizes(list(self.tokens), 1) for t in outputs.packed
        ]
        for stream, of_stream in enumerate(self.projections):
            alone, packed = iter(outputs.streams[stream]), iter([of_streams[stream] for of_streams in parts])
            sources = [_source(p, alone=alone, packed=packed, sums=sums) for p in of_stream]
            found.append([next(source) for source in sources])
        return found


def _source(projection: Projection, *, alone: Iterator[Any], packed: Iterator[Any], sums: Iterator[Any]) -> Any:
    """Which of the three the output of `projection` comes from."""
    if isinstance(projection.end, IntoResidual):
        return sums
    return packed if isinstance(projection.end, PACKING) else alone


def packed_of(projections: Sequence[Projection]) -> list[Projection]:
    """Those whose outputs are packed with other streams'."""
    return [p for p in projections if isinstance(p.end, PACKING)]


def stream_parts(x: Tensor, tokens: Sequence[int]) -> list[Tensor]:
    """The streams that lie in x one after the other; it may hold more than them."""
    sizes = [*tokens, x.shape[1] - sum(tokens)]
    return list(x.split_with_sizes(sizes, 1)[:-1])
