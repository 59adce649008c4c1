"""Is this checkout as fast as another: the same suites in both, in turn, each time in a process of its own.

`python -m benchmarks.two_checkouts ../before` writes `benchmarks/results/<machine>/two_checkouts.json`. The other
checkout needs its extension built (`python setup.py build_ext --inplace` there). A suite also times plain code, which
is the same in both: `times_plain` divides by it, and so takes out what the machine did between two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.run import SUITES
from fdfo_engine.bench.record import header, machine, write

WHOLE = "whole_models"
PLAIN = ("eager", "R")
COMPILED = ("inductor", "C")


class Timing(NamedTuple):
    """One candidate of one case in one process: seconds, and as a multiple of plain code's in that process."""

    case: str
    candidate: str
    seconds: float
    times_plain: float


def main() -> None:
    """Times both, prints a table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--suites", nargs="+", choices=[*SUITES, WHOLE], default=["linear_ops", "block_ops", WHOLE])
    parser.add_argument("--only", default="", help="run the cases of suites with this in their name")
    parser.add_argument("--rounds", type=int, default=3, help="how often each checkout runs a suite; default 3")
    parser.add_argument("--seconds", type=float, default=0.3, help="a candidate and process; default 0.3")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [row for suite in arguments.suites for row in compare(suite, arguments)]
    words = ["OTHER" if word == str(arguments.other) else word for word in sys.argv[1:]]
    content = header("python -m benchmarks.two_checkouts", words)
    content |= {"other_commit": commit(arguments.other), "rounds": arguments.rounds, "rows": rows}
    write(arguments.out or RESULTS / machine(torch.device("cpu")) / "two_checkouts.json", content)


def compare(suite: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a candidate of every case; cases correspond by their order, for their names may have changed."""
    here, there = [], []
    for _ in range(arguments.rounds):
        there.append(timings(suite, arguments.other, arguments))
        here.append(timings(suite, ROOT, arguments))
    assert len(here[0]) == len(there[0]), f"{suite}: the two checkouts have other cases"
    return [
        row(suite, now, before) for now, before in zip(zip(*here, strict=True), zip(*there, strict=True), strict=True)
    ]


def timings(suite: str, checkout: Path, arguments: argparse.Namespace) -> list[Timing]:
    """One run of a suite in a checkout, on one thread."""
    words = ["-m", "benchmarks.run", "--suite", suite, "--only", arguments.only]
    if suite == WHOLE:
        words = ["-m", "fdfo_engine.cli.main", "bench", "--arch", "shapes", "blocks", "--candidates", "RF"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "timings.json"
        command = [sys.executable, *words, "--threads", "1", "--seconds", str(arguments.seconds), "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(out.read_text())["rows"]
    found = whole_model_seconds(rows) if suite == WHOLE else {(r["case"], r["candidate"]): r["median_s"] for r in rows}
    return [
        Timing(case, candidate, taken, taken / next(found[case, name] for name in PLAIN if (case, name) in found))
        for (case, candidate), taken in found.items()
        if candidate not in PLAIN + COMPILED
    ]


def whole_model_seconds(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Median seconds of a rollout step and of a training step, by (case, candidate)."""
    return {
        (f"{r['architecture']}, {step}", r["candidate"]): r[f"{step}_step_s"]["median"]
        for r in rows
        for step in ("rollout", "training")
    }


def row(suite: str, here: tuple[Timing, ...], there: tuple[Timing, ...]) -> dict[str, Any]:
    """Medians over the rounds of both; a ratio below 1 says that this checkout is faster."""
    medians = {
        f"{field}_{side}": statistics.median(getattr(timing, field) for timing in taken)
        for field in ("seconds", "times_plain")
        for side, taken in (("here", here), ("there", there))
    }
    ratios = {
        f"{field}_ratio": medians[f"{field}_here"] / medians[f"{field}_there"] for field in ("seconds", "times_plain")
    }
    every = {"each_here": [t.seconds for t in here], "each_there": [t.seconds for t in there]}
    faster = f"{ratios['seconds_ratio']:.3f}, over plain code {ratios['times_plain_ratio']:.3f}"
    print(f"{here[0].case:50} {here[0].candidate:8} {faster}", flush=True)
    return {"suite": suite, "case": here[0].case, "candidate": here[0].candidate, **medians, **ratios, **every}


def commit(checkout: Path) -> str:
    """Of a checkout."""
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
