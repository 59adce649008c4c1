"""The measuring half of `benchmarks.host_cost`, in the process whose GPU is not there."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_parts import block_cases, pair_cases
from fdfo_engine import ops
from fdfo_engine.bench.architectures import Architecture, architectures, cast_frozen
from fdfo_engine.bench.end_to_end import Candidate, Graphed, native
from fdfo_engine.models.fused import fuse
from fdfo_engine.runtime.interleaved import spread

BATCH = 12
"""Of a forward and of a micro-batch: what the host does hardly depends on it."""

OP_CALLS = 20
"""Of an op in one measurement: the processor's clock is too coarse for one."""

recording: Any = importlib.import_module("offgpu.recording")  # of the tests: their folder is on the path here
DEVICE = torch.device("cuda", 0)


class Timed(NamedTuple):
    """What is timed, and how often in one measurement."""

    name: str
    call: Callable[[], object]
    calls: int


def measured(arch: str, repeats: int) -> dict[str, Any]:
    """Processor seconds and launches of steps of a whole architecture, and of the ops by backend, taken in turn."""
    recorder = recording.Recorder()
    with recording.nothing_computed():
        found = {"steps": list(steps(architectures()[arch])), "ops": list(of_ops())}
        return {
            "architecture": arch,
            "batch": BATCH,
            **{kind: rows(timed, recorder, repeats) for kind, timed in found.items()},
        }


def steps(architecture: Architecture) -> Iterator[Timed]:
    """A rollout's forward, and a forward and backward, of R, E, F and F as CUDA graphs (`fdfo bench`)."""
    makers: dict[str, Callable[..., Candidate]] = {"R": Candidate, "E": native, "F": Candidate, "F as graphs": Graphed}
    for letter, make in makers.items():
        own = architecture.network(DEVICE)  # to each its own: fused blocks lay weights side by side
        cast_frozen(own, torch.bfloat16)
        if letter[0] == "F":
            fuse(own, attention="auto", recompute="none")
        candidate = make(letter[0], architecture, own, DEVICE, torch.bfloat16)
        yield Timed(f"rollout step, {letter}", candidate.rollout_step(BATCH), 1)
        yield Timed(f"training step, {letter}", candidate.training_step(BATCH), 1)


def of_ops() -> Iterator[Timed]:
    """Each op on every backend that can run here; those of a block with their backward."""
    for name, call in block_cases(DEVICE, torch.bfloat16) + pair_cases(DEVICE):
        for backend in ops.candidates(ops.implementations()[name], DEVICE):
            yield Timed(f"{name}, {backend}", partial(call, backend), OP_CALLS)


def rows(timed: Sequence[Timed], recorder: Any, repeats: int) -> list[dict[str, Any]]:
    """Processor seconds of a call, those of autograd's thread too, and what it asked of the GPU."""
    asked = {each.name: _asked(each.call, recorder) for each in timed}
    taken: dict[str, list[float]] = {each.name: [] for each in timed}
    for _ in range(repeats):
        for each in timed:
            started = time.process_time()
            for _ in range(each.calls):
                each.call()
            taken[each.name].append((time.process_time() - started) / each.calls)
    return [{"name": name, "seconds": spread(samples)._asdict(), **asked[name]} for name, samples in taken.items()]


def _asked(call: Callable[[], object], recorder: Any) -> dict[str, Any]:
    for _ in range(3):  # what is compiled, captured or put into tables
        call()
    recorder.reset()
    call()
    return {"launches": sum(recorder.launches.values()), "events": recorder.events}


if __name__ == "__main__":
    recording.answer({"measured": measured})
