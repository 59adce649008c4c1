"""A process before it has imported anything heavy: who started it, and what a signal does to it until a run begins."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fdfo_engine.runtime.errors import Stopped

_SHELLS = ("ash", "bash", "csh", "dash", "fish", "ksh", "mksh", "sh", "tcsh", "zsh")
_LAUNCHERS = ("deepspeed", "deepspeed.pt", "ds", "fdfo", "torchrun")
_LAUNCHER_MODULES = ("deepspeed.launcher.", "fdfo_engine.cli.", "torch.distributed.")


@dataclass(frozen=True)
class Process:
    """A process by its number and its start: the number alone may be given to another one later.

    Attributes:
        pid: its number.
        started: clock ticks after the machine's start.
        words: its command line.
    """

    pid: int
    started: int
    words: tuple[str, ...]

    def is_gone(self) -> bool:
        """Whether it has ended; one that only waits for its parent to hear of it has."""
        stat = _stat(self.pid)
        return stat is None or has_ended(self.pid) or int(stat[19]) != self.started

    @property
    def name(self) -> str:
        """The program; of Python the script or the module that it runs."""
        program = Path(self.words[0]).name.lstrip("-") if self.words else ""
        if not program.startswith("python"):
            return program
        arguments = self.words[1:]
        if "-m" in arguments[:-1]:
            return arguments[arguments.index("-m") + 1]
        return next((Path(word).name for word in arguments if not word.startswith("-")), program)

    @property
    def is_launcher(self) -> bool:
        """Whether it started the run's processes in order to look after them."""
        return self.name in _LAUNCHERS or self.name.startswith(_LAUNCHER_MODULES)


@functools.cache
def starters() -> tuple[Process, ...]:
    """The processes whose end this one has to notice, as they were when this was first asked; the nearest first.

    These are all launchers above it: if `deepspeed` dies, what it has started does not hear of it. Without a launcher
    it is the parent, unless that is a shell, or hangups are ignored, as by `nohup`: then it is meant to be outlived.
    """
    parent = _process(os.getppid())
    launchers, process = [], parent
    while process is not None and process.is_launcher:
        launchers.append(process)
        process = _process(_parent_of(process))
    if launchers or parent is None:
        return tuple(launchers)
    is_to_be_outlived = parent.name in _SHELLS or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return () if is_to_be_outlived else (parent,)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to stop; hangups do not where they are ignored."""
    is_deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if is_deaf else (signal.SIGHUP,)))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise Stopped, until a run takes them over: there is nothing to lose yet.

    Process 1 of a container would else not hear them. Only in the main thread, which alone can.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in stop_signals() if number != signal.SIGINT]  # that is KeyboardInterrupt
    before = {number: signal.signal(number, _leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    raise Stopped(f"{signal.Signals(number).name}: stopped before the run had begun")


def has_ended(pid: int) -> bool:
    """Whether this host has no process `pid`, or only one that waits for its parent to hear of its end."""
    stat = _stat(pid)
    return stat is None or stat[0] in ("Z", "X")


def is_stopped(pid: int) -> bool:
    """Whether process `pid` of this host does not run since it was stopped, by SIGSTOP or a debugger."""
    stat = _stat(pid)
    return stat is not None and stat[0] in ("T", "t")


def _process(pid: int) -> Process | None:
    """The process `pid`; None if there is none, or it is the first one, with which everything ends."""
    stat = _stat(pid)
    if stat is None or pid <= 1:
        return None
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return Process(pid, int(stat[19]), tuple(words[:-1]))


def _parent_of(process: Process) -> int:
    stat = _stat(process.pid)
    return 0 if stat is None else int(stat[1])


def _stat(pid: int) -> list[str] | None:
    """State, parent and so on of a process, from the third field of its `stat` on; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
