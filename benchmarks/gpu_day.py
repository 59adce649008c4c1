"""Everything that is to be measured on a GPU, in one bounded run: `python -m benchmarks.gpu_day --minutes 9 --out DIR`.

Parts, in this order; each is bounded in time, runs in processes of its own, and does not mind how the others ended:

- correctness: builds the extension, and runs the ops' tests against float64 on every backend that is here;
- sanitizer: one small case an op under compute-sanitizer, where that is installed;
- ops: the four suites of `benchmarks.run`, against measured ceilings;
- transformers: what `fdfo bench` measures at real size, plain, compiled, fused, with measured backends, as CUDA graphs;
- epoch: one short epoch at real size under the DeepSpeed launcher;
- profile: kernels of a rollout step and of a training step by time, and how long the GPU idles.

A package or tool that is missing is said, and what needs it is left out. A GPU machine without a network is brought the
folder .gpu_packages, which `make gpu-packages` fills here with less than 64 MiB; packages of its own come first. DIR
gets a file a part and the summary, which holds what was measured against the targets: ready to commit.
`--device cpu` runs a miniature of all of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import ROOT
from benchmarks.gpu_targets import summary

PYTHON = sys.executable
TAIL = 4000
"""Characters of a command's output that are kept."""

PACKAGES = ROOT / ".gpu_packages"
"""Brought along: searched last."""

OUT = "OUT"
"""Stands in a command for the folder that its results go to."""


class Command(NamedTuple):
    """What a part runs, and what has to be there for it: modules and executables."""

    words: Sequence[str]
    modules: Sequence[str] = ()
    tools: Sequence[str] = ()

    def lacks(self) -> list[str]:
        """What is missing of it here."""
        modules = [name for name in self.modules if importlib.util.find_spec(name) is None]
        return modules + [name for name in self.tools if shutil.which(name) is None]


@dataclass(frozen=True)
class Part:
    """Commands that belong together; `weight` is its part of the time that is left."""

    name: str
    weight: float
    commands: Sequence[Command]


@dataclass
class Outcome:
    """How a part went: a line a command, the end of what each printed, and what it wrote as JSON."""

    part: str
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    tails: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether all of it ran and went well."""
        return all(line.startswith("ok") for line in self.lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all parts, writes the files, prints the summary; 0 however they went, since it is a report."""
    arguments = parser().parse_args(argv)
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    parts = cpu_parts() if arguments.device == "cpu" else gpu_parts()
    outcomes = run_parts(parts, 60 * arguments.minutes, arguments.out)
    text = summary([vars(outcome) for outcome in outcomes])
    (arguments.out / "summary.txt").write_text(text)
    print(text)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--minutes", type=float, default=9.0, help="for all parts together; default 9")
    parse.add_argument("--out", type=Path, required=True, help="folder of the results")
    parse.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a miniature of all parts")
    return parse


def engine(*words: str) -> list[str]:
    """A module of the checkout as a command."""
    return [PYTHON, "-m", *words]


def gpu_parts() -> list[Part]:
    """At the sizes that count."""
    suites = [
        Command(engine("benchmarks.run", "--suite", suite, "--seconds", "0.3", "--out", f"{OUT}/{suite}.json"))
        for suite in ("block_ops", "attention_ops", "linear_ops", "pair_ops")
    ]
    small = engine("benchmarks.gpu_parts", "small_ops")
    bench = ["fdfo_engine.cli.main", "bench", "--arch", "sd35-medium", "--candidates", "RCFTG", "--seconds", "3"]
    return [
        Part("correctness", 2.0, [
            Command(engine("benchmarks.gpu_parts", "versions", "--out", f"{OUT}/versions.json")),
            Command([PYTHON, "setup.py", "-q", "build_ext", "--inplace"], ("pybind11", "setuptools"), ("g++",)),
            Command(small),
            Command(engine("pytest", "tests/ops", "-x", "--maxfail", "20"), ("pytest", "pytest_timeout")),
        ]),
        Part("sanitizer", 0.5, [
            Command(["compute-sanitizer", "--error-exitcode", "9", *small], (), ("compute-sanitizer",))
        ]),
        Part("ops", 2.0, suites),
        Part("transformers", 2.5, [
            Command(engine(*bench, "--out", f"{OUT}/bench.json"), ("diffusers", "peft")),
            Command(engine("fdfo_engine.cli.main", "tune", "--arch", "sd35-medium"), ("diffusers", "peft")),
        ]),
        Part("epoch", 1.5, [
            Command(
                engine("benchmarks.real_size", "--image", "512", "--pairs", "4", "--steps", "8", "--deepspeed",
                       "--out", f"{OUT}/epoch.json"),
                ("diffusers", "peft", "deepspeed"),
            )
        ]),
        Part("profile", 0.5, [
            Command(
                engine("benchmarks.gpu_parts", "profile", "--arch", "sd35-medium", "--out", f"{OUT}/profile.json"),
                ("diffusers", "peft"),
            )
        ]),
    ]  # fmt: skip


def cpu_parts() -> list[Part]:
    """The same parts at sizes that a CPU takes in seconds."""
    suites = {
        "block_ops": "gated_residual forward, float32 [24, 76, 96]", "attention_ops": "forward, float32, [24, 64+12",
        "linear_ops": "feed_forward forward, [24, 64, 96]", "pair_ops": "pair_direction",
    }  # fmt: skip
    few, plain = ["--threads", "1", "--seconds", "0.01"], ["--no-inductor"]
    bench = ["fdfo_engine.cli.main", "bench", "--arch", "shapes", "--candidates", "RFTG", "--rollout-batch", "1"]
    epoch = [
        "sampling.pairs_per_epoch=2", "sampling.block_pairs=2", "sampling.steps=4", "update.optimizer_steps=1",
        "run.epochs=1", "evaluation.every=0", "log.images_every=0", f"run.dir={OUT}/run",
    ]  # fmt: skip
    return [
        Part("correctness", 1.0, [
            Command(engine("benchmarks.gpu_parts", "versions", "--out", f"{OUT}/versions.json")),
            Command(engine("pytest", "tests/ops/test_philox.py"), ("pytest", "pytest_timeout")),
        ]),
        Part("sanitizer", 1.0, [Command(engine("benchmarks.gpu_parts", "small_ops"))]),
        Part("ops", 3.0, [
            Command(engine("benchmarks.run", "--suite", s, "--only", only, *few, *plain, "--out", f"{OUT}/{s}.json"))
            for s, only in suites.items()
        ]),
        Part("transformers", 2.0, [
            Command(engine(*bench, "--train-batch", "1", *few, "--out", f"{OUT}/bench.json"), ("diffusers", "peft"))
        ]),
        Part("epoch", 1.0, [
            Command(engine("fdfo_engine.train", "--config", "shapes", *epoch), ("diffusers", "peft", "deepspeed"))
        ]),
        Part("profile", 1.0, [
            Command(
                engine("benchmarks.gpu_parts", "profile", "--arch", "shapes", "--out", f"{OUT}/profile.json"),
                ("diffusers", "peft"),
            )
        ]),
    ]  # fmt: skip


def run_parts(parts: Sequence[Part], seconds: float, folder: Path) -> list[Outcome]:
    """Runs each in the time that its weight gives it of what is left, and writes its file."""
    folder.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + seconds, []
    for number, part in enumerate(parts):
        left, weights = end - time.monotonic(), sum(later.weight for later in parts[number:])
        print(f"== {part.name}: {max(left, 0.0) * part.weight / weights:.0f} s of {left:.0f} s left", flush=True)
        with tempfile.TemporaryDirectory(prefix="gpu-day-") as scratch:
            outcome = run_part(part, left * part.weight / weights, Path(scratch))
        for line in outcome.lines:
            print(f"   {line}", flush=True)
        (folder / f"{part.name}.json").write_text(json.dumps(vars(outcome), indent=1) + "\n")
        outcomes.append(outcome)
    return outcomes


def run_part(part: Part, seconds: float, scratch: Path) -> Outcome:
    """Its commands, one after the other; a command that fails does not keep the next from running."""
    outcome, started = Outcome(part.name), time.monotonic()
    for command in part.commands:
        words = [word.replace(OUT, str(scratch)) for word in command.words]
        name = " ".join(words[1:] if words[0] == PYTHON else words).replace(str(scratch), OUT)
        if lacks := command.lacks():
            outcome.lines.append(f"left out: {name}: {', '.join(lacks)} is missing here")
            continue
        left = seconds - (time.monotonic() - started)
        if left < 1:
            outcome.lines.append(f"left out: {name}: no time is left")
            continue
        code, tail = run_command(words, left)
        word = {0: "ok", None: f"stopped after {left:.0f} s"}.get(code, f"FAILED with {code}")
        outcome.lines.append(f"{word}: {name}")
        outcome.tails[name] = tail
    for file in sorted(scratch.glob("*.json")):
        outcome.results[file.stem] = json.loads(file.read_text())
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def run_command(words: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit status, None where it was stopped, and the end of its output; its children are stopped with it."""
    site = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    given = os.environ.get("PYTHONPATH")
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), given, *site, str(PACKAGES))))
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return code, output.read()[-TAIL:]


if __name__ == "__main__":
    sys.exit(main())
