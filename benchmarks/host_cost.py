"""What the host takes for a launch: processor time of ops and of whole steps on a GPU that is not there.

    python -m benchmarks.host_cost

A CUDA build of torch (`make cuda-torch`) runs on the stand-ins of tests/offgpu/recording_driver, whose kernels take no
time: what is left is Python, torch and Triton's launcher. The driver's own time of a launch is not in it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from fdfo_engine.bench.record import header, write
from fdfo_engine.runtime.console import say

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Measures, prints a table and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sd35-medium")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_x86_64" / "host_cost.json")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    recorded_gpu: Any = importlib.import_module("offgpu.recorded_gpu")
    if why := recorded_gpu.missing():
        say(why)
        return 3
    found = recorded_gpu.ran("benchmarks.host_cost_on_nothing", "measured", arguments.arch, arguments.repeats)
    for row in found["steps"] + found["ops"]:
        say(line(row))
    write(arguments.out, header("python -m benchmarks.host_cost", sys.argv[1:]) | found)
    say(f"written to {arguments.out}")
    return 0


def line(row: dict[str, Any]) -> str:
    """One measurement, for a person."""
    seconds, launches = row["seconds"]["median"], row["launches"]
    each = f"{1e6 * seconds / launches:8.1f} us a launch" if launches else ""
    replays = ", ".join(name for name in row["events"] if name.startswith("replay"))
    return f"{row['name']:32}{1e3 * seconds:9.3f} ms{launches:6} launches{each} {replays}"


if __name__ == "__main__":
    raise SystemExit(main())
