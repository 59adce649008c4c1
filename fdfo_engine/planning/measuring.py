"""Times the backends of each op of a network, at the shapes that the network calls it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.models.flow_model import Conditioning
from fdfo_engine.models.pipeline_model import PipelineModel
from fdfo_engine.ops import Call, Projected, gated_residual_norms, under
from fdfo_engine.runtime.interleaved import Spread, interleaved

ROUNDS, ROUND_S, SECONDS = 5, 1e-3, 0.01
"""Of a call on one backend: rounds at least, how long one is on a CPU, and all of them together at least."""

_TIMESTEP = 500.0
_NOT_TIMED = Spread(0.0, 0.0, 0.0)
Seconds = dict[str, Spread]
"""Of a call on each backend, by name; the fixed order's first."""


@dataclass(frozen=True)
class Timed:
    """How long each backend takes for an op at one shape: of a whole rollout batch, and of a whole micro-batch.

    `rollout` is a forward, `training` forward and backward; either is empty where it was not measured.
    """

    rollout: Seconds = field(default_factory=dict)
    training: Seconds = field(default_factory=dict)

    def per_item(self, rollout_batch: int, train_batch: int) -> Seconds:
        """Seconds an item takes: each is sampled once and trained once."""
        found: Seconds = {}
        for seconds, batch in ((self.rollout, rollout_batch), (self.training, train_batch)):
            for name, spread in seconds.items():
                before = found.get(name, _NOT_TIMED)
                found[name] = Spread(*(a + b / batch for a, b in zip(before, spread, strict=True)))
        return found


def fastest(seconds: Seconds) -> str:
    """The backend to take: the first one, unless the slow calls of another are faster than its own fast ones."""
    first, best = next(iter(seconds)), min(seconds, key=lambda name: seconds[name].median)
    return best if seconds[best].p90 < seconds[first].p10 else first


class Measurement:
    """A `Chooser` that times every call it is asked about, once a shape, and leaves it where it was.

    `met` are the seconds by name of a call. Those that are `known` already are not taken again.
    """

    def __init__(self, device: torch.device, known: Mapping[str, Timed] | None = None) -> None:
        self.met: dict[str, Timed] = {}
        self._known = dict(known or {})
        self._device = device

    def backend(self, call: Call) -> None:
        """See `Chooser.backend`."""
        part = "training" if torch.is_grad_enabled() else "rollout"
        before = self._known.get(call.name, Timed())
        found = self.met.setdefault(call.name, Timed(dict(before.rollout), dict(before.training)))
        seconds: Seconds = getattr(found, part)
        if not seconds:
            seconds.update(self._seconds(call, call.candidates()))

    def _seconds(self, call: Call, names: list[str]) -> Seconds:
        arguments, settings = _detached(call.arguments), _detached(call.settings)
        leaves = [t for t in tensors_of((arguments, settings)) if t.requires_grad]
        make = _forward_backward if torch.is_grad_enabled() and leaves else _forward
        calls = {name: make(partial(call.run, *arguments, **settings, backend=name), leaves) for name in names}
        return under(None, seconds_of, calls, self._device)


def blank_velocity(model: PipelineModel, latents: Tensor) -> Tensor:
    """The velocity at `latents` `[N, C, H, W]` amid the grid, of one blank prompt."""
    count = len(latents)
    row = Conditioning(model.blank_row()).to(model.device)
    timesteps = torch.full((count,), _TIMESTEP)
    return model.velocity(model.network, latents, timesteps, row.rows(torch.zeros(count, dtype=torch.int64)))


def seconds_of(calls: Mapping[str, Callable[[], object]], device: torch.device) -> Seconds:
    """How long the call on each backend takes, in turn; one alone is not timed, since there is nothing to choose."""
    if len(calls) == 1:
        return dict.fromkeys(calls, _NOT_TIMED)
    return interleaved(dict(calls), device, seconds=SECONDS, rounds=ROUNDS, round_s=ROUND_S, warm_up=1)


def _forward(run: Callable[[], Any], _leaves: list[Tensor]) -> Callable[[], object]:
    return lambda: _read(run())


def _forward_backward(run: Callable[[], Any], leaves: list[Tensor]) -> Callable[[], object]:
    upstream: list[Tensor] = []

    def call() -> object:
        outputs = [t for t in tensors_of(_read(run())) if t.requires_grad]
        if not upstream:
            upstream.extend(torch.randn_like(t) for t in outputs)
        return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    return call


def _read(made: Any) -> Any:
    """What a call returned; sums that a product left to the next norm are made by one, as in a block."""
    if not isinstance(made, Projected):
        return made
    normed = [gated_residual_norms([r.to_norm(r.x[:, 0], r.x[:, 0])]) for r in made.residuals]
    return made.streams, made.packed, normed


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of sequences, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
        return
    for part in _parts(value).values():
        yield from tensors_of(part)


def _detached(value: Any) -> Any:
    """The same nest on the same memory, with tensors of no history: a backward ends in them."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    parts = {name: _detached(part) for name, part in _parts(value).items()}
    if not parts:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **parts)
    if isinstance(value, dict):
        return parts
    return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())


def _parts(value: Any) -> dict[Any, Any]:
    """What a nest holds, by name or number; nothing of anything else."""
    if is_dataclass(value) and not isinstance(value, type):
        return {of.name: getattr(value, of.name) for of in fields(value)}
    if isinstance(value, dict):
        return value
    return dict(enumerate(value)) if isinstance(value, tuple | list) else {}
