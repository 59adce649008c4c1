"""Runs a suite and writes its results: `python -m benchmarks.run --suite pair_ops`.

Candidates of a case run in turn in one process: plain code eager and compiled by inductor, the torch reference, and
every fast backend that can run here. `--out` defaults to `benchmarks/results/<machine>/<suite>.json`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, attention_ops, block_ops, linear_ops, pair_ops
from fdfo_engine import ops
from fdfo_engine.bench.record import header, machine, write
from fdfo_engine.runtime.interleaved import Spread, copy_bandwidth, interleaved

SUITES = ("attention_ops", "block_ops", "linear_ops", "pair_ops")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value; plain bfloat16 rounds often


def main() -> None:
    """Times the suite, prints a table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on the CPU; default 1 2")
    parser.add_argument("--pairs", type=int, help="pairs a sampling op works on; default 6, on a GPU 32")
    parser.add_argument("--rows", type=int, default=6, help="items of the loss; default 6")
    parser.add_argument("--samples", type=int, help="that a block op works on; default 2, on a GPU 12")
    parser.add_argument("--only", default="", help="run the cases with this in their name")
    parser.add_argument("--seconds", type=float, default=2.0, help="a candidate; default 2")
    parser.add_argument("--no-inductor", action="store_true", help="leave the compiled plain code out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = header("python -m benchmarks.run", sys.argv[1:]) | {"rows": []}
    for threads in arguments.threads if device.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        bandwidth = copy_bandwidth(device)
        print(f"{device}, {threads} threads, copy {bandwidth / 1e9:.1f} GB/s")
        for case in suite(arguments, device):
            result["rows"] += measure(
                case, device, threads, bandwidth, arguments.seconds, inductor=not arguments.no_inductor
            )  # fmt: skip
    write(arguments.out or RESULTS / machine(device) / f"{arguments.suite}.json", result)


def suite(arguments: argparse.Namespace, device: torch.device) -> list[pair_ops.Case]:
    """The cases that were asked for."""
    gpu = device.type == "cuda"
    pairs = arguments.pairs or (32 if gpu else 6)
    cases = {
        "attention_ops": lambda: attention_ops.cases(device),
        "block_ops": lambda: block_ops.cases(device, samples=arguments.samples or (12 if gpu else 2)),
        "linear_ops": lambda: linear_ops.cases(device, pairs=pairs, rows=arguments.rows),
        "pair_ops": lambda: pair_ops.cases(device, pairs=pairs, rows=arguments.rows),
    }[arguments.suite]()
    return [case for case in cases if arguments.only in case.name]


def measure(
    case: pair_ops.Case, device: torch.device, threads: int, bandwidth: float, seconds: float, *, inductor: bool = True
) -> list[dict[str, Any]]:
    """One row a candidate; prints them."""
    calls = candidates(case, device)
    if not inductor:
        del calls["inductor"]
    require_equal(case, calls)
    taken = interleaved(calls, device, seconds=seconds)
    columns = "".join(f"{c:>10}" for c in ("ms", "p10", "p90", "GB/s", "of copy", "x eager", "x inductor"))
    print(f"\n{case.name}\n{'':12}{columns}")
    return [row(case, name, taken, threads, bandwidth) for name in calls]


def candidates(case: pair_ops.Case, device: torch.device) -> dict[str, Any]:
    """Name of a candidate -> its call, plain code first."""
    torch.compiler.reset()
    calls = {"eager": case.plain(lambda call: call), "inductor": case.plain(torch.compile)}
    refusals = ops.backends(device)
    fitting = [name for name in case.offered if not refusals[name]]
    return calls | {name: lambda name=name: case.op(name) for name in fitting}


def require_equal(case: pair_ops.Case, calls: dict[str, Any]) -> None:
    """A fast wrong answer is not timed: fast backends against the torch reference, and that against plain code."""
    reference = case.check("torch").float()
    for name, call in calls.items():
        is_plain = name in ("eager", "inductor")
        if case.comparable or not is_plain:
            found = call() if is_plain else case.check(name)
            error = (found.float() - reference).abs().max().item()
            bound = TOLERANCE[found.dtype] * reference.abs().max().item()
            assert error <= bound, f"{case.name}: {name} is {error} off"


def row(case: pair_ops.Case, name: str, taken: dict[str, Spread], threads: int, bandwidth: float) -> dict[str, Any]:
    """Prints and returns the figures of one candidate."""
    spread, rate = taken[name], case.num_bytes / taken[name].median
    versus = {other: taken[other].median / spread.median for other in ("eager", "inductor") if other in taken}
    milliseconds = "".join(f"{1e3 * value:10.3f}" for value in spread)
    shares = f"{rate / 1e9:10.1f}{rate / bandwidth:10.0%}{''.join(f'{times:10.2f}' for times in versus.values())}"
    print(f"{name:12}{milliseconds}{shares}")
    return {
        "case": case.name, "candidate": name, "threads": threads, **{f"{k}_s": v for k, v in spread._asdict().items()},
        "bytes": case.num_bytes, "bytes_per_s": rate, "copy_bytes_per_s": bandwidth,
        **{f"times_{other}": times for other, times in versus.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
