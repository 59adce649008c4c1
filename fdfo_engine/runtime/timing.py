"""Seconds spent in each phase of an epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up wall-clock seconds by phase: `with timer.phase("rollout"): ...`, then `timer.take()`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's seconds to `seconds[name]`; on CUDA it waits once, at the end, for the queued work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """`seconds_<phase>` of each phase and `seconds_total` since the last call (or the start), and starts anew."""
        now = time.perf_counter()
        taken = {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}
        taken["seconds_total"] = now - self._start
        self.seconds, self._start = {}, now
        return taken
