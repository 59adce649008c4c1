"""How long every verb takes before it says or does something of its own.

    python -m benchmarks.startup [--repeats 5]

Each command runs in a process of its own, from an empty folder. `--help` is what a person types first; the other
command of a verb is its quickest answer that needs more than the command line: what it says of a run that is not there
or of a run folder. Processor seconds are of the process and its children; they depend less on what else the machine
does than the seconds on the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import RESULTS, ROOT
from fdfo_engine.bench.record import header, write

ANSWERS = {
    "config": ["config"],
    "new": ["new", "mine"],
    "train": ["train", "shapes", "--dry-run"],
    "generate": ["generate", "nowhere", "--prompt", "a", "--out", "out"],
    "evaluate": ["evaluate", "nowhere"],
    "report": ["report", "nowhere"],
    "export": ["export", "nowhere", "out"],
    "status": ["status", "nowhere"],
    "doctor": ["doctor", "--quick"],
    "plan": ["plan", "shapes"],
    "rewards": ["rewards"],
    "schema": ["schema", "events"],
    "serve": ["serve", "nowhere.yaml"],
    "pretrain-shapes": ["pretrain-shapes", "out", "--steps", "0"],
}
HELP_ONLY = ("bench",)


def main() -> None:
    """Starts every verb, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    commands = {"(none)": [["--help"]]} | {verb: [[verb, "--help"], words] for verb, words in ANSWERS.items()}
    commands |= {verb: [[verb, "--help"]] for verb in HELP_ONLY}
    starts = []
    for words in (words for of_verb in commands.values() for words in of_verb):
        starts.append(measured(words, arguments.repeats))
        print(json.dumps(starts[-1]))
    result = header("python -m benchmarks.startup", sys.argv[1:]) | {"repeats": arguments.repeats, "starts": starts}
    write(arguments.out or RESULTS / "cpu_x86_64" / "startup.json", result)


def measured(words: list[str], repeats: int) -> dict:
    """Medians over `repeats` starts, after one that fills the caches of the disk."""
    started(words)
    seconds, processor_seconds, statuses = zip(*(started(words) for _ in range(repeats)), strict=True)
    assert len(set(statuses)) == 1, (words, statuses)
    return {
        "command": " ".join(["fdfo", *words]),
        "exit_status": statuses[0],
        "seconds_median": round(statistics.median(seconds), 3),
        "seconds_least": round(min(seconds), 3),
        "processor_seconds_median": round(statistics.median(processor_seconds), 3),
    }


def started(words: list[str]) -> tuple[float, float, int]:
    """Seconds on the clock, processor seconds and exit status of one start."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "fdfo_engine.cli.main", *words], cwd=folder, env=environment, capture_output=True,
            check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode != 1, done.stderr[-2000:]
    return seconds, processor, done.returncode


if __name__ == "__main__":
    main()
