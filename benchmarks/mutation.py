"""Do the tests notice? Single changes to the code (mutants, by cosmic-ray), each against the tests of its module.

    python -m benchmarks.mutation [--each 4] [--minutes 40] [--modules PATH ...] [--quick] [--again NAME ...]

A mutant is one operator, number or condition changed in a copy of the checkout. It is tried against the quick tests of
its module first, and where none of these fails against all tests of its subject: it is killed if one fails or takes too
long. The same tests must pass on unchanged code first. Mutants are drawn by a seed, the same ones each time, and those
that the results file has are not tried again, unless `--again` names them: the command goes on where it ended. A
survivor's `why` is written by hand into the file, and kept.
"""

from __future__ import annotations

import argparse
import compileall
import difflib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any, NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

from benchmarks import RESULTS, ROOT

_IN_AN_ENGINE = " ".join(
    f"update/test_{file}.py::test_{name}"
    for file, names in {
        "primitives": (
            "a_gradient_tells_the_methods_figures_of_its_items", "refusals_change_nothing",
            "a_loss_by_weights_has_the_gradient_of_the_same_loss_in_process",
            "progress_counts_micro_batches_of_all_shares_and_the_network_trains_meanwhile",
        ),
        "optimizer_steps": (
            "an_applied_step_ends_the_count_of_dropped_ones", "nothing_to_learn_moves_nothing",
            "ten_dropped_steps_in_a_row_stop_the_run",
        ),
    }.items()
    for name in names
)  # fmt: skip
_OF_ZERO = "update/test_zero.py::test_a_restored_engine_goes_on_to_the_bit"
_OF_OVERLAP = "evaluation/test_overlap.py::test_it_counts_and_shows_one " + " ".join(
    f"evaluation/test_overlap.py::test_{name}"
    for name in (
        "a_run_without_evaluations_says_nothing", "sets_that_results_are_measured_on_are_told",
        "evaluating_a_run_on_its_training_prompts_is_told",
    )
)  # fmt: skip
_OF_BATCHES = "evaluation/test_heldout.py::test_ranks_score_whole_batches_and_all_of_them"
_OF_MEASURES = "evaluation/test_compare.py::test_two_rewards_of_one_name_have_a_column_each_as_in_the_log"
_OF_SAVING = "engine/test_saving.py::test_training_goes_on_meanwhile_and_what_is_written_is_of_before"
SUBJECTS = {
    "update": {
        "update/advantage.py": "test_figures.py update/test_advantage.py",
        "update/average.py": "update/test_average.py",
        "update/deal.py": "update/test_deal.py",
        "update/totals.py": "update/test_totals.py",
        "update/items.py": "test_figures.py update/test_micro_batches.py",
        "update/objective.py": "test_figures.py update/test_micro_batches.py",
        "update/half_precision.py": "update/test_half_precision.py::test_the_scale_is_a_power_of_two_for_each_backward",
        "update/updater.py": "update/test_micro_batches.py " + _IN_AN_ENGINE,
        "update/primitives.py": _IN_AN_ENGINE,
        "update/zero.py": "update/test_optimizer_steps.py::test_nothing_to_learn_moves_nothing " + _OF_ZERO,
        "algorithms/fdfo.py": "test_figures.py algorithms/test_formulas.py",
        "algorithms/groups.py": "algorithms/test_formulas.py",
        "algorithms/flow_grpo.py": "algorithms/test_flow_grpo.py",
        "algorithms/clipped_ratio.py": "test_figures.py algorithms/test_formulas.py",
        "algorithms/nft.py": "test_figures.py algorithms/test_formulas.py",
        "algorithms/ablation.py": "test_figures.py algorithms/test_formulas.py",
    },
    "rollout": {
        "rollout/prompts.py": "rollout/test_prompt_order.py rollout/test_prompt_files.py",
        "rollout/prompt_files.py": "rollout/test_prompt_files.py",
        "rollout/prompt_sets.py": "rollout/test_prompt_sets.py",
        "rollout/churn.py": "rollout/test_churn.py",
        "rollout/sampler.py": "rollout/test_generation.py rollout/test_trajectory.py",
        "rollout/blocks.py": "rollout/test_shares.py",
        "rollout/generation.py": "rollout/test_shares.py",
    },
    "trajectory": {
        "trajectory/rollout.py": "rollout/test_kept_rollouts.py",
        "trajectory/renoised.py": "test_figures.py algorithms/test_formulas.py",
        "trajectory/unscored.py": "rollout/test_kept_rollouts.py",
    },
    "checkpoint": {
        "runtime/checkpoint.py": "runtime/test_durable.py runtime/test_checkpoint_store.py",
        "runtime/durable.py": "runtime/test_durable.py",
        "runtime/best_checkpoint.py": "runtime/test_best_checkpoint.py",
        "runtime/run_checkpoints.py": _OF_SAVING,
        "runtime/lost_checkpoints.py": "runtime/test_lost_checkpoints.py",
    },
    "run folder": {
        "runtime/run_folder.py": "runtime/test_run_folder.py",
        "runtime/run_lock.py": "runtime/test_run_folder.py",
        "runtime/event_log.py": "runtime/test_durable.py runtime/test_events.py",
        "runtime/run_status.py": "runtime/test_run_status.py",
        "runtime/json_text.py": "runtime/test_json_text.py",
        "runtime/content_hash.py": "test_figures.py runtime/test_content_hash.py",
    },
    "rewards": {
        "rewards/weighted.py": "rewards/test_weighted.py rewards/test_composition.py",
        "rewards/registry.py": "rewards/test_registry.py",
        "rewards/background.py": "test_figures.py rewards/test_background.py",
        "rewards/isolated.py": "rewards/test_isolated.py",
        "rewards/json_server.py": "test_figures.py rewards/test_server_readiness.py rewards/test_server_rewards.py",
        "rewards/http_reward.py": "rewards/test_server_rewards.py rewards/test_server_readiness.py",
        "rewards/first_token.py": "rewards/test_first_token.py",
        "rewards/geneval_rules.py": "rewards/test_geneval.py",
        "rewards/questions.py": "config/test_method_defaults.py rewards/test_questions.py",
        "rewards/manners.py": "rewards/test_manners.py",
    },
    "config rules": {
        "config/cross_checks.py": "config/test_config_rules.py",
        "config/batch.py": "config/test_batch_plan.py",
        "config/churn.py": "config/test_limits.py config/test_method_defaults.py",
        "config/algorithm.py": "config/test_limits.py config/test_method_defaults.py",
        "config/overrides.py": "config/test_config_overrides.py config/test_config_load.py",
        "config/yaml_source.py": "config/test_config_load.py",
    },
    "evaluation": {
        "evaluation/guard.py": "evaluation/test_guard_findings.py",
        "evaluation/overlap.py": _OF_OVERLAP,
        "evaluation/compare.py": "evaluation/test_summaries.py",
        "evaluation/heldout.py": f"evaluation/test_summaries.py {_OF_BATCHES}",
        "evaluation/measures.py": f"evaluation/test_summaries.py {_OF_MEASURES}",
        "metrics/health.py": "metrics/test_health.py",
        "metrics/diversity.py": "metrics/test_diversity.py",
        "metrics/intervals.py": "metrics/test_intervals.py",
    },
}  # fmt: skip
"""Modules of the package by subject, each with the quick tests that are tried first."""

_FOLDER = [
    *("runtime/test_run_folder.py", "runtime/test_run_status.py", "runtime/test_events.py"),
    *("runtime/test_lost_checkpoints.py", "fuzz/test_run_folder.py"),
]
_CHECKPOINTS = ["runtime/test_durable.py", "runtime/test_checkpoint_store.py", "engine/test_saving.py"]
ALL_TESTS = {
    "update": ["update", "algorithms", "engine/test_micro_batch.py", "engine/test_library.py"],
    "rollout": ["rollout", "algorithms", "engine/test_resume.py", "engine/test_library.py"],
    "trajectory": ["rollout", "algorithms", "engine/test_scoring.py", "fuzz/test_run_folder.py"],
    "checkpoint": [*_CHECKPOINTS, *_FOLDER, "engine/test_resume.py"],
    "run folder": [*_FOLDER, "runtime/test_content_hash.py", "engine/test_run_events.py", "engine/test_resume.py"],
    "rewards": ["rewards", "engine/test_scoring.py", "fuzz/test_replies.py"],
    "config rules": ["config", "cli/test_cli_parsing.py", "fuzz/test_settings.py"],
    "evaluation": ["evaluation", "metrics", "report/test_evaluation_page.py"],
}
"""Tests of each subject that a mutant must get past to count as a survivor."""

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

_AS_FORKED = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "pytest_timeout", "-p", "no:cacheprovider"]
"""The plugins that the tests need were imported before pytest began; others are left out, which take seconds."""

SEED = 19
SLOWER = 5
"""A mutant whose tests take so many times as long as on unchanged code, and half a minute, is killed."""


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


class ControlError(Exception):
    """Tests that fail on unchanged code, and so say nothing of a mutant."""


class Trials:
    """Copies of the checkout, one a process that runs tests in it, and the tests that passed on unchanged code."""

    def __init__(self, folder: Path, count: int) -> None:
        self._free = [copied_checkout(folder / str(number)) for number in range(count)]
        self._lock = threading.Lock()
        self._limits_s: dict[str, float] = {}

    def outcome(self, mutant: Mutant, *, is_quick: bool) -> dict[str, Any]:
        """Runs the quick tests on a changed copy, then all of the subject while none fails, and changes it back."""
        with self._lock:
            copy = self._free.pop()
        try:
            return self._tried(copy, mutant, is_quick=is_quick)
        finally:
            with self._lock:
                self._free.append(copy)

    def _tried(self, copy: Path, mutant: Mutant, *, is_quick: bool) -> dict[str, Any]:
        file = copy / "fdfo_engine" / mutant.module
        code, changed = texts(mutant)
        started = time.monotonic()
        for tests in tests_of(mutant.module)[: 1 if is_quick else 2]:
            self._require_pass(copy, tests)
            file.write_text(changed)
            try:
                killed, told = self._failed(copy, tests, self._limits_s[tests])
            finally:
                file.write_text(code)
            if killed:
                break
        seconds = round(time.monotonic() - started, 1)
        return {"killed": killed, "by": told, "diff": difference(mutant), "tests": tests, "seconds": seconds}

    def _require_pass(self, copy: Path, tests: str) -> None:
        """The control: tests that fail on unchanged code would kill every mutant."""
        if tests in self._limits_s:
            return
        started = time.monotonic()
        fails, told = self._failed(copy, tests, None)
        if fails:
            raise ControlError(f"{tests}: fails on unchanged code: {told}\n{(copy / 'output.txt').read_text()[-2000:]}")
        self._limits_s[tests] = 30 + SLOWER * (time.monotonic() - started)

    def _failed(self, copy: Path, tests: str, limit_s: float | None) -> tuple[bool, str]:
        """Whether a test fails, and which."""
        output = copy / "output.txt"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.imports_of_others", "__main__"])
        process = context.Process(target=run_tests, args=(copy, tests, output))
        process.start()
        process.join(limit_s)
        if process.is_alive():
            process.kill()
            process.join()
            return True, f"no end within {limit_s:.0f} s"
        told = [line for line in output.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
        return process.exitcode != 0, told[0][:160] if told else ""


def main() -> None:
    """Tries what is left of the sample, and writes after each mutant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=4, help="mutants a module")
    parser.add_argument("--modules", nargs="*", help="of the table, by path; default: all")
    parser.add_argument("--quick", action="store_true", help="quick tests alone; who survives is tried again later")
    parser.add_argument("--again", nargs="*", default=[], help="mutants to try again, by name")
    parser.add_argument("--minutes", type=float, default=40, help="no further mutant is begun after this time")
    parser.add_argument("--processes", type=int, default=1, help="mutants at a time, each in a copy of its own")
    parser.add_argument("--out", type=Path, default=RESULTS / "mutation.json")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    tried = still_there(json.loads(arguments.out.read_text())["mutants"]) if arguments.out.is_file() else {}
    drawn = [
        mutant for mutant in sample(arguments.each) if arguments.modules is None or mutant.module in arguments.modules
    ]
    again = [mutant for name in arguments.again for mutant in mutants_of(name.split(":")[0]) if mutant.name == name]
    chosen = [*again, *(mutant for mutant in drawn if mutant not in again and is_open(mutant, tried, arguments.quick))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.processes) as pool:
        trials, writing = Trials(Path(folder), arguments.processes), threading.Lock()

        def attempt(mutant: Mutant) -> None:
            if time.monotonic() > end:
                return
            try:
                found = trials.outcome(mutant, is_quick=arguments.quick)
            except ControlError as error:
                print(f"{mutant.name} was not tried: {error}", flush=True)
                return
            with writing:
                why = tried.get(mutant.name, {}).get("why")
                tried[mutant.name] = found | ({"why": why} if why and not found["killed"] else {})
                print(mutant.name, "killed" if found["killed"] else "SURVIVED", found["seconds"], flush=True)
                arguments.out.write_text(json.dumps(record(tried), indent=1) + "\n")

        list(pool.map(attempt, chosen))


def tests_of(module: str) -> tuple[str, str]:
    """The quick tests of a module, and all of its subject."""
    return next(
        (modules[module], " ".join(ALL_TESTS[subject])) for subject, modules in SUBJECTS.items() if module in modules
    )  # fmt: skip


def sample(each: int) -> list[Mutant]:
    """`each` mutants of every module, in turn, so that a run that ends early has some of all."""
    rows: list[list[Mutant]] = []
    for module in (module for modules in SUBJECTS.values() for module in modules):
        found = mutants_of(module)
        rows.append(random.Random(f"{SEED} {module}").sample(found, min(each, len(found))))
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


def is_open(mutant: Mutant, tried: dict[str, Any], is_quick: bool) -> bool:
    """Whether it was not tried yet, or has met the quick tests alone and survived them."""
    row = tried.get(mutant.name)
    return row is None or not (is_quick or row["killed"] or row["tests"] == tests_of(mutant.module)[1])


def texts(mutant: Mutant) -> tuple[str, str]:
    """Its module's code, and the same changed."""
    code = (ROOT / "fdfo_engine" / mutant.module).read_text()
    return code, mutate_code(code, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)


def difference(mutant: Mutant) -> list[str]:
    """The lines that it takes away and those that it puts there."""
    code, changed = texts(mutant)
    lines = difflib.unified_diff(code.splitlines(), changed.splitlines(), lineterm="", n=0)
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def still_there(tried: dict[str, Any]) -> dict[str, Any]:
    """Those of a results file that are mutants of the code as it is now."""
    modules = {name.split(":")[0] for name in tried} & {module for own in SUBJECTS.values() for module in own}
    present = {mutant.name: mutant for module in modules for mutant in mutants_of(module)}
    return {name: of for name, of in tried.items() if name in present and difference(present[name]) == of["diff"]}


def run_tests(copy: Path, tests: str, output: Path) -> None:
    """In a process that was forked off after the imports of others, and before any of ours."""
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    sys.dont_write_bytecode = True
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import pytest

    words = [str(copy / "tests" / name) for name in tests.split()]
    sys.exit(pytest.main(["-x", "-q", "--no-header", *_AS_FORKED, *words]))


def copied_checkout(folder: Path) -> Path:
    """The files that git knows, compiled, and the compiled extension."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "fdfo_engine").glob("*.so")]
    for name in filter(lambda name: (ROOT / name).is_file(), [*listed.splitlines(), *compiled]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for package in ("fdfo_engine", "tests"):  # valid by content: two changes in one second would look alike by date
        compileall.compile_dir(folder / package, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
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
