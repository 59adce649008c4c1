"""Starts the main job as a user does: by `python`, `torchrun` or `deepspeed`, away from this process's own group."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "fdfo_engine" / "train.py"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(name, ranks):
    """The words before the script."""
    if name == "deepspeed":
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks),
                "--master_port", str(free_port())]  # fmt: skip
    if name == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    assert (name, ranks) == ("python", 1)
    return [sys.executable]


def environment(**variables):
    """This process's environment without a group, with the tests' modules importable (rewards, workers)."""
    found = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        found.pop(name, None)
    return found | variables


def launch(script, *words, by="python", ranks=1, timeout=280, **variables):
    """The finished process, with its output as text."""
    command = [*launcher(by, ranks), str(script), *map(str, words)]
    return subprocess.run(
        command, env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )  # fmt: skip
