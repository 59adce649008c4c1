"""What a run survives, in figures: kills, faults, the cost of saving, and how soon a dead or hung rank is noticed.

    python -m benchmarks.reliability

Each part is written when it is done; the same command goes on with the parts that are missing, and `--fresh` begins
again. Each harness is shown a planted implementation that does it wrong, which it must find out.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.nursery import HOLDS_THE_INTERPRETER, WAITS_FOR_A_LOCK, Nursery, status_of
from benchmarks.soak import soak
from benchmarks.training_kills import TRAINED, lost, planted_failures, training_kills
from fdfo_engine import Engine, load_config
from fdfo_engine.bench.record import header, write

TIMEOUT_S = 6
STOPS_WITHIN_S = 60
LONGER = ("sampling.pairs_per_epoch=16", "run.epochs=1000", f"comm.timeout_s={TIMEOUT_S}")
"""Phases long enough to be met."""

FAULTS = (
    ("killed", signal.SIGKILL, "rollout", 1), ("killed", signal.SIGKILL, "update", 0),
    ("stopped", signal.SIGSTOP, "rollout", 0), ("stopped", signal.SIGSTOP, "update", 1),
    ("waits for a lock", WAITS_FOR_A_LOCK, "update", 1), ("holds the interpreter", HOLDS_THE_INTERPRETER, "rollout", 1),
)  # fmt: skip
Part = Callable[[Nursery, Path, argparse.Namespace], dict[str, Any]]


def main() -> None:
    """Runs the parts that are missing, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save-kills", type=int, default=120, help="of a process that does nothing but save")
    parser.add_argument("--kills", type=int, default=16, help="of a training run of one rank; half of them of two")
    parser.add_argument("--epochs", type=int, default=2, help="of the shapes run, to see what saving costs")
    parser.add_argument("--soak-epochs", type=int, default=300, help="short ones, of one run that nobody kills")
    parser.add_argument("--fuzz-seconds", type=int, default=10, help="of each parser, where atheris is installed")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.json")
    arguments = parser.parse_args()
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    result = header("python -m benchmarks.reliability", words) | {"parts": {}}
    result["parts"] = {} if arguments.fresh else _kept(arguments.out, result)
    with tempfile.TemporaryDirectory(prefix="reliability-") as base, Nursery() as nursery:
        for name, part in PARTS.items():
            if name not in result["parts"]:
                began = time.monotonic()
                result["parts"][name] = part(nursery, Path(base), arguments)
                print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
                write(arguments.out, result | summary(result["parts"]))
    print(json.dumps(summary(result["parts"]), indent=1))
    sys.exit(1 if summary(result["parts"])["failures"] else 0)


def _kept(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call of the same command on the same commit has measured."""
    before = json.loads(out.read_text()) if out.is_file() else {}
    is_same = all(before.get(key) == result[key] for key in ("command", "commit"))
    parts: dict[str, Any] = before["parts"] if is_same else {}
    return parts


def saves(_nursery: Nursery, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL of a process that saves back to back, and of one that writes in place."""
    return {
        "store": _kill_harness(base / "store", arguments.save_kills, "store"),
        "planted_writer_in_place": _kill_harness(base / "naive", arguments.save_kills // 3, "naive"),
    }


def _kill_harness(folder: Path, kills: int, kind: str) -> dict[str, Any]:
    harness = ROOT / "tests/runtime/kill_harness.py"
    words = [sys.executable, str(harness), str(folder), str(kills), kind]
    counts: dict[str, Any] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return counts


def one_rank(nursery: Nursery, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL of a run of one rank; and of the planted one."""
    found = training_kills(nursery, base, ranks=1, kills=arguments.kills, seed=0)
    return found | {"planted": planted_failures(nursery, base, most=8)}


def two_ranks(nursery: Nursery, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL of one of two ranks."""
    return training_kills(nursery, base, ranks=2, kills=max(1, arguments.kills // 2), seed=1)


def faults(nursery: Nursery, base: Path, _arguments: argparse.Namespace) -> dict[str, Any]:
    """One of two ranks dies or hangs; and hangs in a run without a watchdog."""
    rows = [fault(nursery, base / f"fault_{i}", *row) for i, row in enumerate(FAULTS)]
    planted = fault(nursery, base / "unwatched", *FAULTS[2], planted="no_watchdog", patience_s=4 * TIMEOUT_S)
    return {"comm.timeout_s": TIMEOUT_S, "faults": rows, "planted_without_watchdog": planted}


def fault(
    nursery: Nursery, folder: Path, what: str, number: signal.Signals, phase: str, rank: int, *, planted: str = "",
    patience_s: float = TIMEOUT_S + STOPS_WITHIN_S,
) -> dict[str, Any]:  # fmt: skip
    """Sends the signal in the phase, and looks how the run ends."""
    run_dir = folder / "run"
    words = (f"run.dir={run_dir}", *TRAINED, *LONGER)
    ranks = nursery.start(folder, "shapes", *words, ranks=2, PLANTED=planted)
    if planted:
        ranks.wait_until_saved(run_dir)
    else:
        ranks.wait_for(run_dir, rank, phase)
    ranks.kill(rank, number)
    began = time.monotonic()
    codes = ranks.wait(patience_s)
    status = status_of(run_dir)
    named = f"rank {rank} (process {ranks.pids[rank]}), in {phase}, at " in str(status.get("message"))
    return {
        "fault": what, "phase": phase, "rank": rank, "seconds_to_the_end": round(time.monotonic() - began, 1),
        "exit_code_of_the_other": codes[1 - rank], "named_with_phase": named, "exit_code_told": status.get("exit_code"),
        "resumable": not lost(run_dir),
    }  # fmt: skip


def save_cost(_nursery: Nursery, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the shapes run as it is shipped: seconds of an epoch, of a save that is waited for, of one beside training."""
    torch.set_num_threads(1)
    rows = []
    with Engine(load_config("shapes", [f"run.dir={base / 'shapes'}", "log.tensorboard=false"])) as engine:
        prompts = ["a red circle"] * engine.config.sampling.pairs_per_epoch
        for _ in range(arguments.epochs):
            epoch_s = _seconds(lambda: _train(engine, prompts))
            waited_s = _seconds(engine.save)
            begun_s = _seconds(engine.begin_save)
            engine.saving.finish(wait=True)
            rows.append({"epoch_s": epoch_s, "save_waited_for_s": waited_s, "save_beside_training_s": begun_s})
        size = sum(file.stat().st_size for file in engine.save().iterdir())
    share = [row["save_beside_training_s"] / row["epoch_s"] for row in rows]
    whole = [row["save_waited_for_s"] / row["epoch_s"] for row in rows]
    return {"bytes": size, "epochs": rows, "share_of_an_epoch": max(share), "share_if_waited_for": max(whole)}


def long_run(nursery: Nursery, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Many short epochs; and of a run that leaks."""
    found = soak(nursery, base / "soak", arguments.soak_epochs)
    return found | {"planted_leaks": soak(nursery, base / "leaks", max(12, arguments.soak_epochs // 10), leaks=True)}


def inputs(_nursery: Nursery, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Our parsers under atheris; with its own planted mistake."""
    if find_spec("atheris") is None:
        return {"left_out": 'atheris is not installed: pip install "fdfo-engine[fuzz]"', "inputs": 0}
    out = base / "fuzz.json"
    seconds = f"--seconds={arguments.fuzz_seconds}"
    words = [sys.executable, "-m", "benchmarks.guided_fuzz", seconds, f"--out={out}"]
    subprocess.run(words, check=False)
    found = json.loads(out.read_text())
    return {"inputs": sum(of["inputs"] for of in found["targets"].values()), "failures": found["failures"]}


def _train(engine: Engine, prompts: list[str]) -> None:
    rollout = engine.rollout(prompts)
    engine.update(rollout, torch.randn(len(prompts), 2, generator=torch.Generator().manual_seed(0)))


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def summary(parts: dict[str, Any]) -> dict[str, Any]:
    """The figures in one place, and all that does not hold."""
    rows = parts.get("faults", {}).get("faults", [])
    dead = [row["seconds_to_the_end"] for row in rows if row["fault"] == "killed"]
    hung = [row["seconds_to_the_end"] for row in rows if row["fault"] != "killed"]
    trained = [parts[name] for name in ("kills_of_one_rank", "kills_of_two_ranks") if name in parts]
    return {
        "kills": sum(part["kills"] for part in trained) + parts.get("saves", {}).get("store", {}).get("kills", 0),
        "kills_of_training_during_saves": sum(part["kills_during_saves"] for part in trained),
        "faults_tried": len(rows),
        "seconds_to_notice_a_dead_rank": max(dead, default=None),
        "seconds_to_notice_a_hung_rank": max(hung, default=None),
        "inputs_tried": parts.get("inputs", {}).get("inputs"),
        "soaked_epochs": parts.get("soak", {}).get("epochs"),
        "save_share_of_an_epoch": parts.get("save_cost", {}).get("share_of_an_epoch"),
        "failures": failures(parts),
    }  # fmt: skip


def failures(parts: dict[str, Any]) -> list[str]:
    """What does not hold; a harness that does not find out what was planted is one too."""
    found = [failure for part in parts.values() for failure in part.get("failures", [])]
    if "saves" in parts:
        store, naive = parts["saves"]["store"], parts["saves"]["planted_writer_in_place"]
        kinds = ("unloadable", "torn", "lost")
        found += [f"{store[kind]} {kind} of {store['kills']} kills amid saves" for kind in kinds if store[kind]]
        found += [] if any(naive[kind] for kind in kinds) else ["the writer in place was not found out"]
    if "kills_of_one_rank" in parts and not parts["kills_of_one_rank"]["planted"]["found"]:
        found.append("the run that tells too early was not found out")
    if "soak" in parts and len(parts["soak"]["planted_leaks"]["failures"]) < 3:
        found.append("what a leaking reward keeps was not found out")
    if "faults" in parts:
        found += [f"fault: {row}" for row in parts["faults"]["faults"] if not _holds(row)]
        planted = parts["faults"]["planted_without_watchdog"]
        found += ["a run without a watchdog was not found out"] if _holds(planted) else []
    return found


def _holds(row: dict[str, Any]) -> bool:
    ended = row["exit_code_of_the_other"] == row["exit_code_told"] == 8
    return bool(ended and row["named_with_phase"] and row["resumable"])


PARTS: dict[str, Part] = {
    "saves": saves, "faults": faults, "kills_of_one_rank": one_rank, "save_cost": save_cost,
    "kills_of_two_ranks": two_ranks, "soak": long_run, "inputs": inputs,
}  # fmt: skip

if __name__ == "__main__":
    main()
