"""Starting a job on several ranks, under the DeepSpeed launcher, and telling how it really ended."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from fdfo_engine.runtime.environment import gpu_driver
from fdfo_engine.runtime.errors import EnvironmentProblem, Stopped, UsageError
from fdfo_engine.runtime.starting import stop_signals

STOP_TIMEOUT_S = 120.0  # ranks finish what they are in and save
_QUIET = [] if os.environ.get("FDFO_DEBUG") == "1" else ["--quiet"]


def ranks_of(wanted: int | None) -> int:
    """`--ranks`, or one a GPU, and one on a machine without.

    Raises:
        UsageError: less than one.
    """
    if wanted is None:
        import torch

        return max(1, torch.cuda.device_count())
    if wanted < 1:
        raise UsageError(f"--ranks {wanted}: takes 1 or more")
    return wanted


def launch(job: Sequence[str], ranks: int) -> int:
    """The launcher's exit status. A stop signal goes to the ranks too: the launcher would leave them behind.

    `job` is a script, or `--module` and a module, with its arguments.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise EnvironmentProblem("deepspeed is not installed: pip install deepspeed")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    launcher += [*_QUIET, "--master_port", str(_free_port()), *job]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    if gpu_driver() is None:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # else each of its processes says that it has found no GPU
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    process = subprocess.Popen(launcher, env=environment, start_new_session=True)

    def forward(number: int, _frame: FrameType | None) -> None:
        os.killpg(process.pid, number)

    previous = {number: signal.signal(number, forward) for number in stop_signals()}
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


def true_status(run_dir: Path, started: float, launcher: int) -> int:
    """The exit status in `status.json`, if this launch wrote it."""
    from fdfo_engine.runtime.run_status import read_status

    status = read_status(run_dir)
    if status is None or status["heartbeat"] < started:
        return launcher if launcher >= 0 else Stopped.exit_code
    code = status["exit_code"]
    return code if isinstance(code, int) else max(launcher, 1)
