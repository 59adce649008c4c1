"""Who started a process, and whether that one is still there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fdfo_engine.runtime import starting
from fdfo_engine.runtime.errors import Stopped
from fdfo_engine.runtime.starting import Process, ended_by_signals

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("line", "name", "is_launcher"),
    [
        ("/usr/bin/python3 -u -m deepspeed.launcher.launch --world_info=x train.py", "deepspeed.launcher.launch", True),
        ("python -m deepspeed.launcher.runner --num_gpus 2 train.py", "deepspeed.launcher.runner", True),
        ("/venv/bin/python3.11 /venv/bin/deepspeed --num_gpus 2 fdfo_engine/train.py", "deepspeed", True),
        ("python -m torch.distributed.run --standalone train.py", "torch.distributed.run", True),
        ("python /venv/bin/torchrun train.py", "torchrun", True),
        ("/venv/bin/python /venv/bin/fdfo train shapes --ranks 2", "fdfo", True),
        ("python -m fdfo_engine.cli.main train shapes", "fdfo_engine.cli.main", True),
        ("bash -c deepspeed train.py &", "bash", False),
        ("bash run_deepspeed.sh", "bash", False),
        ("-zsh", "zsh", False),
        ("python torch.py", "torch.py", False),
        ("python -m pytest tests", "pytest", False),
        ("slurmstepd: [12.0]", "slurmstepd:", False),
        ("python", "python", False),
    ],
)
def test_launchers_are_known_by_what_they_run(line, name, is_launcher):
    process = Process(1, 1, tuple(line.split()))
    assert (process.name, process.is_launcher) == (name, is_launcher)


def test_a_process_is_gone_once_it_has_ended_heard_of_or_not():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = starting._process(child.pid)
    assert not process.is_gone()
    assert Process(process.pid, process.started - 1, process.words).is_gone()  # its number was given anew
    child.kill()
    deadline = time.monotonic() + 20
    while not process.is_gone() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.is_gone()  # nobody has waited for it yet
    child.communicate()
    assert process.is_gone()


SHOW = """
import sys
from fdfo_engine.runtime.starting import starters
print(*(p.pid for p in starters()))
"""


@pytest.mark.parametrize(
    ("words", "watches"),
    [([], True), (["nohup"], False), (["bash", "-c", '"$@"; true', "bash"], False)],
    ids=["program", "nohup", "shell"],
)
def test_a_parent_is_watched_unless_it_is_meant_to_be_outlived(words, watches):
    command = [*words, sys.executable, "-c", SHOW]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout.split() == ([str(os.getpid())] if watches else [])


def test_before_a_run_a_signal_ends_the_process_as_stopped():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    for number in (signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(Stopped, match=number.name), ended_by_signals():
            os.kill(os.getpid(), number)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_the_main_job_looks_before_it_imports_anything_heavy():
    code = (
        "import sys\n"
        "class Last:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'pydantic':\n"
        "            from fdfo_engine.runtime.starting import starters\n"
        "            print(starters.cache_info().currsize)\n"
        "sys.meta_path.insert(0, Last())\nimport fdfo_engine.train\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split()[0] == "1"
