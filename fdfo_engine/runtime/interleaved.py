"""Times several candidates side by side: in turn, round after round, so that a machine's drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Call = Callable[[], object]
HEAD_START_CYCLES = 2_000_000  # about a millisecond
MIN_ROUNDS = 11


class Spread(NamedTuple):
    """Seconds a call: median and tenths of the rounds."""

    median: float
    p10: float
    p90: float


def interleaved(
    calls: dict[str, Call], device: torch.device, *, seconds: float = 2.0, rounds: int = MIN_ROUNDS,
    round_s: float = 1e-2, warm_up: int = 2,
) -> dict[str, Spread]:  # fmt: skip
    """Times each call by rounds, at least so many, until all together have taken about `seconds` each.

    On a GPU by events, with the L2 cache flushed before every call; on the CPU by the wall clock, with enough calls a
    round to take `round_s`: caches are as warm as calls that follow each other leave them, for all alike.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    timer = _GpuTimer(device) if device.type == "cuda" else _CpuTimer(round_s)
    repeats = {name: timer.repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    while len(next(iter(samples.values()))) < rounds or time.perf_counter() - started < seconds * len(calls):
        for name, call in calls.items():
            samples[name].append(timer.seconds(call, repeats[name]))
    return {name: spread(taken) for name, taken in samples.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a plain copy, read and written, far larger than any cache."""
    count = (1 << 28) if device.type == "cuda" else (1 << 24)
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    taken = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=1.0)["copy"]
    return 2 * source.nbytes / taken.median


class _CpuTimer:
    def __init__(self, round_s: float) -> None:
        self._round_s = round_s

    def repeats(self, call: Call) -> int:
        return max(1, round(self._round_s / max(self.seconds(call, 1), 1e-7)))

    def seconds(self, call: Call, repeats: int) -> float:
        if repeats > 1:  # what the candidate before left in the caches is not charged to this one
            call()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) / repeats


class _GpuTimer:
    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def repeats(self, _call: Call) -> int:
        return 1

    def seconds(self, call: Call, _repeats: int) -> float:
        first, last = self._events
        self._flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)  # the host is ahead when the clock starts: kernels are timed, not Python
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        taken: float = first.elapsed_time(last) / 1e3
        return taken


def spread(samples: list[float]) -> Spread:
    """Of seconds of at least two rounds."""
    tenths = statistics.quantiles(samples, n=10)
    return Spread(statistics.median(samples), tenths[0], tenths[-1])
