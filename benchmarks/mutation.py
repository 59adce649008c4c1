"""Do the tests notice? Single changes to the code (mutants, by cosmic-ray), each against the tests of its module.

    python -m benchmarks.mutation [--each 6] [--minutes 40] [--modules PATH ...] [--out FILE]

A mutant is one operator, number or condition changed in a copy of the checkout. It is killed if a test fails or takes
too long; the same tests must pass on unchanged code first. Mutants are drawn by a seed, the same ones each time, and
those that the results file has are not tried again: the command goes on where it ended. A survivor's `why` is written
by hand into the file, and kept.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

from benchmarks import RESULTS, ROOT

SUBJECTS = {
    "update": {
        "update/advantage.py": "update/test_advantage.py", "update/average.py": "update/test_average.py",
        "update/deal.py": "update/test_deal.py", "update/totals.py": "update/test_totals.py",
        "update/updater.py": "update/test_optimizer_steps.py",
    },
    "rollout": {
        "rollout/prompts.py": "rollout/test_prompt_files.py rollout/test_prompt_order.py",
        "rollout/prompt_files.py": "rollout/test_prompt_files.py", "rollout/churn.py": "rollout/test_churn.py",
    },
    "trajectory": {"trajectory/rollout.py": "rollout/test_trajectory.py engine/test_library.py"},
    "checkpoint": {
        "runtime/checkpoint.py": "runtime/test_checkpoint_store.py fuzz/test_run_folder.py",
        "runtime/durable.py": "runtime/test_checkpoint_store.py runtime/test_run_folder.py",
    },
    "run folder": {
        "runtime/run_folder.py": "runtime/test_run_folder.py fuzz/test_run_folder.py",
        "runtime/run_lock.py": "runtime/test_run_folder.py", "runtime/event_log.py": "runtime/test_events.py",
    },
    "rewards": {
        "rewards/weighted.py": "rewards/test_weighted.py rewards/test_composition.py",
        "rewards/first_token.py": "rewards/test_first_token.py",
        "rewards/json_server.py": "rewards/test_server_rewards.py",
    },
    "config rules": {
        "config/cross_checks.py": "config/test_config_rules.py", "config/batch.py": "config/test_batch_plan.py",
        "config/churn.py": "config/test_method_defaults.py config/test_config_rules.py",
    },
    "evaluation": {
        "evaluation/guard.py": "evaluation/test_guard_findings.py",
        "evaluation/overlap.py": "evaluation/test_overlap.py",
    },
}  # fmt: skip
"""Modules of the package by subject, each with the tests that must notice what is changed in it."""

PAIRS = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul")
COMPARISONS = ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_Gt", "Gt_Lt", "Is_IsNot", "IsNot_Is")
OPERATORS = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in PAIRS),
    *(f"ReplaceComparisonOperator_{pair}" for pair in COMPARISONS),
    "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not", "AddNot", "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak", "NumberReplacer", "ZeroIterationForLoop",
)  # fmt: skip
"""Of cosmic-ray's; left out are those that mostly make what no interpreter takes, such as `<<` for `+`."""

_AS_FORKED = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
"""Plugins of pytest were imported before it."""

SEED = 19
TIMEOUT_S = 300


class Mutant(NamedTuple):
    """One change."""

    module: str
    operator: str
    occurrence: int
    line: int

    @property
    def name(self) -> str:
        """What tells it from others."""
        return f"{self.module}:{self.line} {self.operator} {self.occurrence}"


def main() -> None:
    """Tries what is left of the sample, and writes after each mutant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=6, help="mutants a module")
    parser.add_argument("--modules", nargs="*", help="of the table, by path; default: all")
    parser.add_argument("--minutes", type=float, default=40, help="no further mutant is begun after this time")
    parser.add_argument("--out", type=Path, default=RESULTS / "mutation.json")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    tried = json.loads(arguments.out.read_text())["mutants"] if arguments.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        copy, passing = copied_checkout(Path(folder)), set()
        for mutant, tests in sample(arguments.each):
            is_left_out = arguments.modules is not None and mutant.module not in arguments.modules
            if is_left_out or mutant.name in tried or time.monotonic() > end:
                continue
            if tests not in passing:
                require_pass(copy, tests)
                passing.add(tests)
            tried[mutant.name] = outcome(copy, mutant, tests)
            print(mutant.name, "killed" if tried[mutant.name]["killed"] else "SURVIVED", flush=True)
            arguments.out.write_text(json.dumps(record(tried), indent=1) + "\n")


def sample(each: int) -> list[tuple[Mutant, str]]:
    """Mutants with their tests: `each` of every module, in turn, so that a run that ends early has some of all."""
    rows: list[list[tuple[Mutant, str]]] = []
    for modules in SUBJECTS.values():
        for module, tests in modules.items():
            drawn = random.Random(f"{SEED} {module}").sample(found := mutants_of(module), min(each, len(found)))
            rows.append([(mutant, tests) for mutant in drawn])
    return [row[number] for number in range(each) for row in rows if number < len(row)]


def mutants_of(module: str) -> list[Mutant]:
    """Every change that the operators can make in a module."""
    tree = get_ast((ROOT / "fdfo_engine" / module).read_text())
    found = []
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        places = [start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        found += [Mutant(module, name, number, line) for number, (line, _) in enumerate(places)]
    return found


def outcome(copy: Path, mutant: Mutant, tests: str) -> dict[str, Any]:
    """Runs the tests on the changed copy, and changes it back."""
    file = copy / "fdfo_engine" / mutant.module
    code = file.read_text()
    changed = mutate_code(code, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
    file.write_text(changed)
    started = time.monotonic()
    try:
        killed, told = failed(copy, tests)
    finally:
        file.write_text(code)
    lines = difflib.unified_diff(code.splitlines(), changed.splitlines(), lineterm="", n=0)
    diff = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    seconds = round(time.monotonic() - started, 1)
    return {"killed": killed, "by": told, "diff": diff, "tests": tests, "seconds": seconds}


def require_pass(copy: Path, tests: str) -> None:
    """The control: tests that fail on unchanged code would kill every mutant."""
    fails, told = failed(copy, tests)
    if fails:
        raise SystemExit(f"{tests}: fails on unchanged code: {told}\n{(copy / 'output.txt').read_text()[-2000:]}")


def failed(copy: Path, tests: str) -> tuple[bool, str]:
    """Whether a test fails, and which."""
    output = copy / "output.txt"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest", "pydantic", "diffusers", "deepspeed"])
    process = context.Process(target=run_tests, args=(copy, tests, output))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return True, f"no end within {TIMEOUT_S} s"
    told = [line for line in output.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return process.exitcode != 0, told[0][:160] if told else ""


def run_tests(copy: Path, tests: str, output: Path) -> None:
    """In a process that was forked off after the heavy imports, and before any of ours."""
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    sys.dont_write_bytecode = True
    import pytest

    words = [str(copy / "tests" / name) for name in tests.split()]
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *_AS_FORKED, *words]))


def copied_checkout(folder: Path) -> Path:
    """The files that git knows, and the compiled extension."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "fdfo_engine").glob("*.so")]
    for name in [*listed.splitlines(), *compiled]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def record(tried: dict[str, Any]) -> dict[str, Any]:
    """Counts by subject, survivors, and every mutant that was tried."""
    from fdfo_engine.bench.record import header  # not above: the tests' process must take ours from the copy

    subjects = {}
    for subject, modules in SUBJECTS.items():
        own = {name: of for name, of in tried.items() if name.split(":")[0] in modules}
        killed = sum(of["killed"] for of in own.values())
        left = {name: {"why": of.get("why", ""), "diff": of["diff"]} for name, of in own.items() if not of["killed"]}
        subjects[subject] = {"tried": len(own), "killed": killed, "survivors": left}
    killed = sum(of["killed"] for of in tried.values())
    about = {"cosmic_ray": version("cosmic-ray"), "seed": SEED, "tried": len(tried), "killed": killed}
    return header("python -m benchmarks.mutation", sys.argv[1:]) | about | {"subjects": subjects, "mutants": tried}


if __name__ == "__main__":
    main()
