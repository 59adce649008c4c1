"""What measuring the backends of ops gains: `python -m benchmarks.tuned --threads 1`.

Of each transformer the table of `fdfo tune`, then a rollout step and a training step with the measured choice and with
the fixed order, in turn, on the same weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS
from fdfo_engine.bench.architectures import Architecture, architectures, sharing
from fdfo_engine.bench.end_to_end import Candidate
from fdfo_engine.bench.record import header, machine, write
from fdfo_engine.bench.tuning import measured_architecture
from fdfo_engine.models.fused import fuse
from fdfo_engine.planning.kernel_cache import Batches
from fdfo_engine.planning.kernels import Kernels, put_in_force
from fdfo_engine.planning.measuring import fastest
from fdfo_engine.runtime.interleaved import Spread, interleaved

FIXED, MEASURED = "fixed order", "measured"


def main() -> None:
    """Measures, prints and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["shapes", "blocks"], choices=list(architectures()))
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; default 1")
    parser.add_argument("--seconds", type=float, default=5.0, help="about, a candidate and step; default 5")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    known = architectures()
    rows = [measure(name, known[name], device, arguments.seconds) for name in arguments.arch]
    result = header("python -m benchmarks.tuned", sys.argv[1:]) | {"threads": arguments.threads, "rows": rows}
    write(arguments.out or RESULTS / machine(device) / "tuned.json", result)


def measure(name: str, architecture: Architecture, device: torch.device, seconds: float) -> dict[str, Any]:
    """The table of one architecture, and its steps by both."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = architecture.network(device, dtype)
    copies = {FIXED: sharing(network), MEASURED: sharing(network)}
    for copy in copies.values():
        fuse(copy)
    batches = Batches(architecture.rollout_batch, architecture.train_batch)
    kernels = measured_architecture(architecture, copies[MEASURED], device, dtype, batches)
    put_in_force(copies[MEASURED], kernels)
    found = {which: Candidate(which, architecture, copy, device, dtype) for which, copy in copies.items()}
    rollout = interleaved({w: c.rollout_step(batches.rollout) for w, c in found.items()}, device, seconds=seconds)
    training = interleaved({w: c.training_step(batches.train) for w, c in found.items()}, device, seconds=seconds)
    print(f"\n{name}\n{kernels.table()}\nrollout step {gain(rollout):.3f}, training step {gain(training):.3f} as fast")
    return {
        "architecture": name, "batches": batches._asdict(), "ops": ops_of(kernels),
        "rollout_step_s": {which: spread._asdict() for which, spread in rollout.items()},
        "training_step_s": {which: spread._asdict() for which, spread in training.items()},
        "rollout_gain": gain(rollout), "training_gain": gain(training),
    }  # fmt: skip


def gain(steps: dict[str, Spread]) -> float:
    """How many times as fast the measured choice is."""
    return steps[FIXED].median / steps[MEASURED].median


def ops_of(kernels: Kernels) -> dict[str, Any]:
    """Of each op at a shape the seconds an item on each backend, and what is taken."""
    return {
        name: {"taken": fastest(seconds), "seconds": {backend: of.median for backend, of in seconds.items()}}
        for name, seconds in kernels.measured.items()
    }


if __name__ == "__main__":
    main()
