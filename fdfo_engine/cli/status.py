"""`fdfo status`: how a run is doing."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from fdfo_engine.cli.options import add_run_dir
from fdfo_engine.runtime.console import say, visible
from fdfo_engine.runtime.errors import CheckpointError, GuardStop, UsageError

_ADVICE = {
    "died": "the process is gone without a word; the same command resumes from the last checkpoint",
    "stopped": "the same command resumes",
}
_STOPPED_BY_GUARD = (
    "evaluation.guard ended it; evaluation.guard.action=off goes on, another reward takes another run.dir"
)


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "status",
        help="say how a run is doing",
        description="Prints status.json of a run folder in words. Exit code 0 whatever the run's state is.",
    )
    add_run_dir(parse)
    parse.add_argument("--json", action="store_true", help="the record as it is")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the status."""
    from fdfo_engine.runtime.best_checkpoint import read_best
    from fdfo_engine.runtime.run_folder import checkpoint_store, runs_beside
    from fdfo_engine.runtime.run_status import read_status

    try:
        status = read_status(arguments.run_dir)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{arguments.run_dir}: its status.json cannot be read: {error}") from error
    store = checkpoint_store(arguments.run_dir)
    if status is None and store.names() and not arguments.json:
        say(f"{arguments.run_dir}: driven by the Python interface, which keeps no status; newest: {store.names()[-1]}")
        return 0
    if status is None:
        raise UsageError(f"{arguments.run_dir}: no run folder; it has no status.json{runs_beside(arguments.run_dir)}")
    newest = status.get("last_checkpoint") or next(reversed(store.names()), "none yet")
    best = None if arguments.json else read_best(arguments.run_dir)
    for line in [json.dumps(status, indent=1)] if arguments.json else describe(arguments.run_dir, status, newest):
        say(line)
    if best is not None:
        say(f"  best        {best}")
    return 0


def describe(run_dir: Path, status: dict[str, Any], newest: str) -> list[str]:
    """The record in words, a line each; text from the run is shown with its control characters escaped.

    `newest`: the newest checkpoint.
    """
    state, code = str(status.get("state", "unknown")), status.get("exit_code")
    age = time.time() - float(status.get("heartbeat") or 0)
    lines = [
        f"{run_dir}: {state}{_phase(status)}" + (f" (exit code {code})" if code else ""),
        f"  epoch       {status.get('epoch')} of {status.get('epochs') or '?'}{_reward(status)}",
        f"  checkpoint  {newest}",
        f"  heartbeat   {age:.0f} s ago, process {status.get('pid')} on {status.get('host')}",
    ]
    lines += [f"  message     {part}" for part in str(status.get("message") or "").splitlines()]
    advice = _STOPPED_BY_GUARD if state == "stopped" and code == GuardStop.exit_code else _ADVICE.get(state)
    lines += [f"  {advice}"] if advice else []
    return [visible(line) for line in lines]


def _phase(status: dict[str, Any]) -> str:
    """What is being done, how far it is and how long it still takes, where the record says so."""
    phase, total, left_s = (status.get(name) for name in ("phase", "total", "eta_s"))
    if not phase or status.get("state") not in ("starting", "running"):
        return ""
    from fdfo_engine.runtime.terminal import duration

    words = f", in {phase}"
    if total:
        words += f", {status.get('done') or 0} of {total} {status.get('unit') or ''}"
    return words + (f", left {duration(left_s)}" if left_s is not None else "")


def _reward(status: dict[str, Any]) -> str:
    mean = status.get("reward_mean")
    return "" if mean is None else f", reward {mean:.4f}"
