"""Ranks of a training run, forked off a process that has imported everything: a start takes a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serve_kills import free_port
from fdfo_engine.runtime.process import is_alive
from fdfo_engine.runtime.rank_files import read_sign

PATIENCE_S = 400.0
WAITS_FOR_A_LOCK, HOLDS_THE_INTERPRETER = signal.SIGUSR1, signal.SIGUSR2
"""What a rank does for ever when it gets this signal."""


class Nursery:
    """A context manager that starts ranks as `fdfo_engine/train.py` would.

    The variable PLANTED makes a rank do something wrong: `tells_early` tells of a checkpoint before it is committed,
    `no_watchdog` is what it says.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment` of the ranks; None is this process's."""
        self._environment = environment

    def __enter__(self) -> Nursery:
        command = [sys.executable, "-c", _NURSERY]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=self._environment)
        assert self._process.stdout is not None
        while self._process.stdout.readline() != "ready\n":  # libraries print, too
            assert self._process.poll() is None
        return self

    def start(self, folder: Path, config: Path | str, *overrides: str, ranks: int = 1, **variables: str) -> Ranks:
        """Starts every rank of a run; their output goes to `folder/log`."""
        folder.mkdir(exist_ok=True)
        port = str(free_port())
        each = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            | {"MASTER_PORT": port, **variables}
            for rank in range(ranks)
        ]
        job = {"words": [str(config), *overrides], "log": str(folder / "log"), "ranks": each}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Ranks(json.loads(self._process.stdout.readline()), folder)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class Ranks:
    """The processes of one run.

    Attributes:
        pids: by rank.
        folder: where `log` is.
    """

    def __init__(self, pids: Sequence[int], folder: Path) -> None:
        self.pids, self.folder = list(pids), folder

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to one rank."""
        os.kill(self.pids[rank], number)

    def wait(self, timeout_s: float) -> list[int | None]:
        """The exit code of each, None of one that was killed; those that are left after that time are killed."""
        deadline = time.monotonic() + timeout_s
        while any(map(is_alive, self.pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.end()
        return [self._code(rank) for rank in range(len(self.pids))]

    def end(self) -> None:
        """Kills whoever is left."""
        for pid in self.pids:
            while is_alive(pid):
                os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)

    def is_running(self) -> bool:
        """Whether all of them are."""
        return all(map(is_alive, self.pids))

    def wait_until_saved(self, run_dir: Path) -> None:
        """Until the run has told of a checkpoint."""
        self._wait(lambda: status_of(run_dir).get("last_checkpoint") is not None)

    def wait_for(self, run_dir: Path, rank: int, phase: str) -> None:
        """Until `rank` says that it is in `phase`, after the first checkpoint."""
        self.wait_until_saved(run_dir)

        def is_there() -> bool:
            sign = read_sign(run_dir, rank, self.pids[rank])
            return sign is not None and sign.place.startswith(phase)

        self._wait(is_there)

    def _wait(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert self.is_running(), self.log()[-3000:]
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.02)

    def log(self) -> str:
        """What they printed."""
        return (self.folder / "log").read_text(errors="replace")

    def _code(self, rank: int) -> int | None:
        file = self.folder / f"log.{rank}.{self.pids[rank]}"
        return int(file.read_text()) if file.is_file() else None


def status_of(run_dir: Path) -> dict[str, Any]:
    """status.json of a run; empty before there is one."""
    file = run_dir / "status.json"
    status: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return status


_NURSERY = """
import contextlib, ctypes, json, os, signal, sys, threading, time
import torch, deepspeed, diffusers, transformers
torch.set_num_threads(1)
from fdfo_engine import loop, train
from fdfo_engine.runtime import checkpoint, events, process
from fdfo_engine.update.saving import Saving

def waits_for_a_lock(*_):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def holds_the_interpreter(*_):
    ctypes.PyDLL(None).sleep(100_000)

def plant(what):
    if what == "no_watchdog":
        loop.Watch = lambda *_: contextlib.nullcontext()
    if what == "tells_early":
        begin, write = Saving.begin, checkpoint.write_synced
        def early(saving, checkpoints, average, state):
            path = begin(saving, checkpoints, average, state)
            saving._progress.stream.tell(events.Checkpoint(epoch=state["epoch"], name=path.name))
            return path
        def slow(path, data):
            time.sleep(0.2)
            write(path, data)
        Saving.begin, checkpoint.write_synced = early, slow

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    job, pids = json.loads(line), []
    for environment in job["ranks"]:
        pid = os.fork()
        if pid == 0:
            os.environ |= environment
            out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            leave, note = os._exit, f"{job['log']}.{environment['RANK']}.{os.getpid()}"
            def noted(code):
                open(note, "w").write(str(code))
                leave(code)
            os._exit = noted
            signal.signal(signal.SIGUSR1, waits_for_a_lock)
            signal.signal(signal.SIGUSR2, holds_the_interpreter)
            plant(os.environ.get("PLANTED"))
            process.claim_process()
            process.end_process(train.main(["--config", *job["words"]]))
        pids.append(pid)
    print(json.dumps(pids), flush=True)
"""
