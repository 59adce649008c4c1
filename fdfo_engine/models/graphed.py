"""The network's forward as a CUDA graph: between the steps of a rollout neither Python nor launches take time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdfo_engine.models.flow_model import Network

WARM_UP_CALLS = 3
"""Calls before a capture: libraries allocate workspaces and choose algorithms in them, which a graph may not hold."""


def graph_refusals(device: torch.device, *, zero_stage: int, is_compiled: bool) -> list[str]:
    """Reasons why a rollout's forward can't be captured; an empty list means it can."""
    reasons = []
    if device.type != "cuda":
        reasons.append(f"CUDA graphs need a CUDA device; the model is on {device}")
    if zero_stage == 3:
        reasons.append("at zero.stage 3 weights are gathered to another address in every call")
    if is_compiled:
        reasons.append("model.compile captures its own graphs")
    return reasons


class GraphedNetwork:
    """Calls `network` without gradients: inputs of new shapes are captured once, then replayed.

    A replay reads each weight where it lay at the capture: optimiser steps and copies in place are seen.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._captured: dict[tuple[Any, ...], _Captured] = {}

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> tuple[Tensor, ...]:
        """As `network(**inputs)`; the outputs are the caller's own."""
        key = tuple((k, v.shape, v.dtype) if isinstance(v, Tensor) else (k, v) for k, v in sorted(inputs.items()))
        if key not in self._captured:
            self._captured[key] = _Captured(self._network, inputs)
        return self._captured[key].replay(inputs)


class _Captured:
    """One graph, the tensors that it reads and those that it writes."""

    def __init__(self, network: Network, inputs: dict[str, Any]) -> None:
        self._inputs = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        caller, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(caller)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                network(**self._inputs)
        caller.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = network(**self._inputs)

    def replay(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self._inputs[name].copy_(value)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)
