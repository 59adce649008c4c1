"""Our own parsers under atheris, which changes its inputs towards code that they have not reached yet.

    python -m benchmarks.guided_fuzz [--seconds 60] [--targets NAME ...] [--out FILE]

An input ends in a value or in the words of one of our errors; anything else is a finding, told with its bytes.
`planted` is a parser with a mistake, which must be found out. Wants the extra `fuzz`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import RESULTS

PLANTED = "planted"


def main() -> None:
    """Fuzzes every target for so long, each in a process of its own, and writes what was tried and found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="of each target; default 60")
    parser.add_argument("--targets", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability" / "guided_fuzz.json")
    parser.add_argument("--one", nargs=2, metavar=("TARGET", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        fuzz_here(arguments.one[0], Path(arguments.one[1]), arguments.seconds)
    from benchmarks.guided_targets import TARGETS
    from fdfo_engine.bench.record import header, write

    found = {name: fuzzed(name, arguments.seconds) for name in arguments.targets or TARGETS}
    result = header("python -m benchmarks.guided_fuzz", sys.argv[1:]) | {"atheris": version("atheris")}
    write(arguments.out, result | {"targets": found, "failures": failures(found)})
    sys.exit(1 if failures(found) else 0)


def fuzzed(name: str, seconds: int) -> dict[str, Any]:
    """One target: inputs tried, branches of our code reached, and the finding that ended it, if one did."""
    with tempfile.TemporaryDirectory(prefix="guided-") as folder:
        command = [sys.executable, "-m", "benchmarks.guided_fuzz", "--seconds", str(seconds), "--one", name, folder]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        inputs = [file.read_bytes() for file in Path(folder).glob("found-*")]
    told = done.stdout + done.stderr
    reached = [int(number) for number in re.findall(r"\bcov: (\d+)", told)]
    tried = re.search(r"number_of_executed_units: *(\d+)", told)
    found = {
        "inputs": int(tried[1]) if tried else 0, "branches_reached": max(reached, default=0),
        "finding": re.findall(r"^\s*=== Uncaught Python exception: ===\n(.*)$", told, re.MULTILINE),
        "found_by": [repr(data[:300]) for data in inputs],
    }  # fmt: skip
    if not found["inputs"] or (done.returncode and not inputs):
        raise SystemExit(f"{name}: did not run:\n{told[-3000:]}")
    print(json.dumps({name: found}), flush=True)
    return found


def failures(found: dict[str, Any]) -> list[str]:
    """Targets with a finding; and the planted one without."""
    wrong = [name for name, of in found.items() if bool(of["found_by"]) != (name == PLANTED)]
    return [f"{name}: {found[name]['finding'] or 'nothing was found'}" for name in wrong]


def fuzz_here(name: str, folder: Path, seconds: int) -> None:
    """Fuzzes in this process, and ends it."""
    import atheris

    with atheris.instrument_imports(include=["fdfo_engine", "benchmarks.guided_targets"]):
        from benchmarks.guided_targets import TARGETS
    target, seeds = TARGETS[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)
    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=2048", "-timeout=30"]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={folder}/found-", *options], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
