"""`fdfo train`: the main job, with the launcher started for you."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from fdfo_engine.cli.options import add_config, config_words
from fdfo_engine.runtime.errors import EnvironmentProblem, Stopped, UsageError

STOP_TIMEOUT_S = 120.0  # ranks finish what they are in and save
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "train",
        help="train; the same command again resumes",
        description="Starts fdfo_engine/train.py on one process, or under the DeepSpeed launcher on several.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parse.add_argument("-h", "--help", action=_HelpWithKeys, nargs=0, help="show this message and every setting")
    add_config(parse)
    parse.add_argument("--ranks", type=int, help="processes; default: one a GPU, one on a machine without")
    parse.add_argument("--dry-run", action="store_true", help="print the resolved settings and the arithmetic; stop")
    parse.add_argument("--resume", action="store_true", help="insist that there is a checkpoint to continue from")
    parse.set_defaults(verb=run)


class _HelpWithKeys(argparse.Action):
    """`--help` that lists the settings; they are read only when somebody asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fdfo_engine.config import describe_keys

        parser.epilog = "settings:\n" + describe_keys()
        parser.print_help()
        parser.exit()


def run(arguments: argparse.Namespace) -> int:
    """Trains; returns the exit status of the run, which the launcher itself would misreport."""
    from fdfo_engine.config import load_config

    ranks = _default_ranks() if arguments.ranks is None else arguments.ranks
    if ranks < 1:
        raise UsageError(f"--ranks {ranks}: takes 1 or more")
    name, overrides = config_words(arguments)
    flags = [flag for flag in ("--dry-run", "--resume") if getattr(arguments, flag[2:].replace("-", "_"))]
    command = ["--config", name, *flags, *overrides]
    if ranks == 1:
        from fdfo_engine.train import main

        return main(command)
    config = load_config(name, overrides)  # a mistake is told here, before the launcher starts
    started = time.time()
    status = _launch(command, ranks)
    return status if arguments.dry_run else _true_status(Path(config.run.dir), started, status)


def _default_ranks() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _launch(command: list[str], ranks: int) -> int:
    """The launcher's exit status. A stop signal goes to the ranks too: the launcher would leave them behind."""
    if importlib.util.find_spec("deepspeed") is None:
        raise EnvironmentProblem("deepspeed is not installed: pip install deepspeed")
    script = Path(__file__).resolve().parent.parent / "train.py"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    launcher += ["--master_port", str(_free_port()), str(script), *command]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    process = subprocess.Popen(launcher, env=environment, start_new_session=True)

    def forward(number: int, _frame: FrameType | None) -> None:
        os.killpg(process.pid, number)

    previous = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        status = process.wait()
        _wait_for_group(process.pid)  # the launcher dies of a signal that the ranks first act on
        return status
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for_group(group: int) -> None:
    """Returns when no process of `group` is left, or after `STOP_TIMEOUT_S`."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port


def _true_status(run_dir: Path, started: float, launcher: int) -> int:
    """The exit status in `status.json`, if this launch wrote it."""
    from fdfo_engine.runtime.run_status import read_status

    status = read_status(run_dir)
    if status is None or status["heartbeat"] < started:
        return launcher if launcher >= 0 else Stopped.exit_code
    code = status["exit_code"]
    return code if isinstance(code, int) else max(launcher, 1)
