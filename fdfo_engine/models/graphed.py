"""The network's forward and backward as CUDA graphs: between launches neither Python nor the host takes time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fdfo_engine.models.flow_model import Network

Run = Callable[[], None]
Capture = Callable[..., tuple[Run, ...]]

WARM_UP_CALLS = 3
"""Calls before a capture: libraries allocate workspaces and choose algorithms in them, which a graph may not hold."""


def graph_refusals(device: torch.device, *, zero_stage: int, is_compiled: bool, checkpoints: bool) -> list[str]:
    """Reasons why the network can't be captured; an empty list means it can. `checkpoints`: recomputes whole blocks."""
    reasons = []
    if device.type != "cuda":
        reasons.append(f"CUDA graphs need a CUDA device; the model is on {device}")
    if zero_stage == 3:
        reasons.append("at zero.stage 3 weights are gathered to another address in every call")
    if is_compiled:
        reasons.append("model.compile captures its own graphs")
    if checkpoints:
        reasons.append(
            "model.gradient_checkpointing: true reads random generators, which a capture forbids; fc1 does not"
        )
    return reasons


def cuda_graphs(*parts: Run) -> tuple[Run, ...]:
    """Replays of `parts`, each captured once; run in this order, as the memory of one may serve the next."""
    caller, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(caller)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            for part in parts:
                part()
    caller.wait_stream(side)
    pool, replays = None, list[Run]()
    for part in parts:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            part()
        pool = graph.pool()
        replays.append(graph.replay)
    return tuple(replays)


class GraphedNetwork:
    """Calls `network` without gradients: inputs of new shapes are captured once, then replayed.

    A replay reads each weight where it lay at the capture: optimiser steps and copies in place are seen.
    """

    def __init__(self, network: Network, capture: Capture = cuda_graphs) -> None:
        self._network, self._capture = network, capture
        self._captured: dict[tuple[Any, ...], _Forward] = {}

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> tuple[Tensor, ...]:
        """As `network(**inputs)`; the outputs are the caller's own."""
        key = _shapes(inputs)
        if key not in self._captured:
            self._captured[key] = _Forward(self._network, inputs, self._capture)
        return self._captured[key].replay(inputs)


class GraphedTraining:
    """Calls `network` for gradients of `parameters`: inputs of new shapes are captured once, forward and backward.

    Its backward has to come before the next forward of the same shapes, whose activations take the place of its own.
    `module` is what `network` computes with.
    """

    def __init__(
        self, network: Network, module: nn.Module, parameters: Sequence[Tensor], capture: Capture = cuda_graphs
    ) -> None:
        self._network, self._module, self._parameters, self._capture = network, module, list(parameters), capture
        self._captured: dict[tuple[Any, ...], _Step] = {}

    def __call__(self, **inputs: Any) -> tuple[Tensor, ...]:
        """As `network(**inputs)`; outputs and gradients are the caller's own. Inputs get no gradient."""
        key = _shapes(inputs)
        if key not in self._captured:
            self._captured[key] = _Step(self._network, self._module, self._parameters, inputs, self._capture)
        found: tuple[Tensor, ...] = _Replay.apply(self._captured[key], inputs, *self._parameters)
        return found


def _shapes(inputs: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((k, v.shape, v.dtype) if isinstance(v, Tensor) else (k, v) for k, v in sorted(inputs.items()))


class _Inputs:
    """The tensors that a graph reads."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.held = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}

    def copy(self, inputs: dict[str, Any]) -> None:
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self.held[name].copy_(value)


class _Forward:
    """One graph, the tensors that it reads and those that it writes."""

    def __init__(self, network: Network, inputs: dict[str, Any], capture: Capture) -> None:
        self._network, self._inputs = network, _Inputs(inputs)
        self._outputs: tuple[Tensor, ...] = ()
        (self._replay,) = capture(self._run)

    def _run(self) -> None:
        self._outputs = self._network(**self._inputs.held)

    def replay(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        self._inputs.copy(inputs)
        self._replay()
        return tuple(output.clone() for output in self._outputs)


class _Step:
    """Two graphs, forward and backward, and the tensors that they read and write."""

    def __init__(
        self, network: Network, module: nn.Module, parameters: Sequence[Tensor], inputs: dict[str, Any],
        capture: Capture,
    ) -> None:  # fmt: skip
        self._network, self._module, self._parameters, self._inputs = network, module, parameters, _Inputs(inputs)
        self._leaves: list[nn.Parameter] = []
        self._outputs: tuple[Tensor, ...] = ()
        self._upstream: tuple[Tensor, ...] = ()
        self._gradients: tuple[Tensor | None, ...] = ()
        self.forwards = 0
        self._replay_forward, self._replay_backward = capture(self._run_forward, self._run_backward)

    @torch.enable_grad()
    def _run_forward(self) -> None:
        # autograd ties a parameter to the stream that first used it, and a capture may not wait for another: leaves on
        # the same memory, made here, belong to the capture's own
        self._leaves = [nn.Parameter(parameter.detach()) for parameter in self._parameters]
        with _computing_with(self._leaves, self._parameters, self._module):
            self._outputs = tuple(self._network(**self._inputs.held))
        if not self._upstream:  # in the warm-up: not in the memory of a graph
            self._upstream = tuple(map(torch.zeros_like, self._outputs))

    def _run_backward(self) -> None:
        self._gradients = torch.autograd.grad(
            self._outputs, self._leaves, self._upstream, allow_unused=True
        )  # fmt: skip

    def forward(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        self._inputs.copy(inputs)
        self._replay_forward()
        self.forwards += 1
        return tuple(output.detach().clone() for output in self._outputs)

    def backward(self, upstream: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        for held, given in zip(self._upstream, upstream, strict=True):
            held.copy_(given)
        self._replay_backward()
        # clones: what autograd is handed may become a parameter's .grad, which the next replay would write into
        return tuple(None if g is None else g.clone() for g in self._gradients)


@contextmanager
def _computing_with(leaves: Sequence[nn.Parameter], parameters: Sequence[Tensor], module: nn.Module) -> Iterator[None]:
    """Within this context `module` has `leaves` in the place of its `parameters`."""
    instead = {id(parameter): leaf for parameter, leaf in zip(parameters, leaves, strict=True)}
    owned = [
        (owner, name, p) for owner in module.modules() for name, p in owner._parameters.items() if id(p) in instead
    ]
    for owner, name, parameter in owned:
        owner._parameters[name] = instead[id(parameter)]
    try:
        yield
    finally:
        for owner, name, parameter in owned:
            owner._parameters[name] = parameter


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: _Step, inputs: dict[str, Any], *_: Tensor) -> tuple[Tensor, ...]:
        outputs = step.forward(inputs)
        ctx.step, ctx.number = step, step.forwards
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        assert ctx.number == ctx.step.forwards, "another forward has taken the place of the one to go back through"
        return None, None, *ctx.step.backward(upstream)
