"""The measuring half of `benchmarks.host_cost`, in the process whose GPU is not there."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_parts import block_cases, pair_cases
from fdfo_engine import ops
from fdfo_engine.bench.architectures import Architecture, architectures, cast_frozen, sharing
from fdfo_engine.bench.end_to_end import Candidate, Graphed, native
from fdfo_engine.models.fused import fuse
from fdfo_engine.runtime.interleaved import spread

BATCH = 12
"""Of a forward and of a micro-batch: what the host does hardly depends on it."""

OP_CALLS = 20
"""Of an op in one measurement: the processor's clock is too coarse for one."""

recording: Any = importlib.import_module("offgpu.recording")  # of the tests: their folder is on the path here
DEVICE = torch.device("cuda", 0)


def measured(arch: str, repeats: int) -> dict[str, Any]:
    """Processor seconds and launches of steps of a whole architecture, and of the ops, by backend."""
    recorder = recording.Recorder()
    with recording.nothing_computed():
        return {
            "architecture": arch,
            "batch": BATCH,
            "steps": steps(architectures()[arch], recorder, repeats),
            "ops": of_ops(recorder, repeats),
        }


def steps(architecture: Architecture, recorder: Any, repeats: int) -> list[dict[str, Any]]:
    """A rollout's forward, and a forward and backward, of R, E, F and F as CUDA graphs (`fdfo bench`)."""
    network = architecture.network(DEVICE)
    cast_frozen(network, torch.bfloat16)
    rows = []
    for letter, make in {"R": Candidate, "E": native, "F": Candidate, "F as graphs": Graphed}.items():
        own = sharing(network)
        if letter[0] == "F":
            fuse(own, attention="auto", recompute="none")
        candidate = make(letter[0], architecture, own, DEVICE, torch.bfloat16)
        for name, step in (("rollout", candidate.rollout_step(BATCH)), ("training", candidate.training_step(BATCH))):
            rows.append(row(f"{name} step, {letter}", step, recorder, repeats))
    return rows


def of_ops(recorder: Any, repeats: int) -> list[dict[str, Any]]:
    """Each op on every backend that can run here; those of a block with their backward."""
    rows = []
    for name, call in block_cases(DEVICE, torch.bfloat16) + pair_cases(DEVICE):
        for backend in ops.candidates(ops.implementations()[name], DEVICE):
            rows.append(row(f"{name}, {backend}", lambda c=call, b=backend: c(b), recorder, repeats, OP_CALLS))
    return rows


def row(name: str, call: Callable[[], object], recorder: Any, repeats: int, calls: int = 1) -> dict[str, Any]:
    """Processor seconds of a call, those of autograd's thread too, and what it asked of the GPU."""
    for _ in range(3):  # what is compiled, captured or put into tables
        call()
    recorder.reset()
    taken = [_seconds(call, calls) for _ in range(repeats)]
    total = repeats * calls
    return {
        "name": name,
        "seconds": spread(taken)._asdict(),
        "launches": sum(recorder.launches.values()) / total,
        "events": {event: count / total for event, count in recorder.events.items()},
    }


def _seconds(call: Callable[[], object], calls: int) -> float:
    started = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - started) / calls


if __name__ == "__main__":
    recording.answer({"measured": measured})
