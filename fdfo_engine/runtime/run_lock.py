"""One process a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.durable import storage_error
from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.runtime.json_text import json_object
from fdfo_engine.runtime.process import is_alive
from fdfo_engine.runtime.run_status import HEARTBEAT_S, heartbeat

LOCK_NAME = "run.lock"
SILENCE_S = 5 * HEARTBEAT_S
"""A run of another host whose heartbeat stands still for that long is over."""


class RunLock:
    """An exclusive lock on a run folder: the kernel's, which dies with its process, and in a file whose it is."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._descriptor: int | None = None

    def take(self) -> None:
        """Takes the lock; one left by a dead process of this host is taken over, with a printed line.

        Raises:
            UsageError: a live process has it, or one on another host may; names pid, host and start.
            CheckpointError: the lock file cannot be written.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise storage_error(self.path, error) from error
        try:
            free = _try_flock(descriptor)
            holder = _holder(descriptor)
            self._refuse_if_held(holder, free)
            _write_holder(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise storage_error(self.path, error) from error
        except UsageError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        if holder:
            say(f"took over {self.path.parent}: its last process, {_shown(holder)}, is gone")

    def release(self) -> None:
        """Gives the lock up; nothing if it was not taken."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _refuse_if_held(self, holder: dict[str, Any] | None, free: bool | None) -> None:
        if free is False:
            raise UsageError(f"{self.path.parent} is in use by {_shown(holder)}; choose another run.dir or stop it")
        if holder and holder.get("host") != socket.gethostname() and not (free and self._is_silent(holder)):
            raise UsageError(
                f"{self.path.parent} was in use by {_shown(holder)}, which cannot be checked from here; "
                f"if that run is over, delete {self.path}"
            )
        if holder and free is None and is_alive(holder["pid"]):
            raise UsageError(f"{self.path.parent} is in use by {_shown(holder)}")

    def _is_silent(self, holder: dict[str, Any]) -> bool:
        """Whether a run of another host, or of this one under another name, has stopped renewing its heartbeat.

        Its lock is free already; but not every network storage shares locks between hosts.
        """
        before = heartbeat(self.path.parent)
        if before is None:
            return False
        say(f"{self.path.parent} was in use by {_shown(holder)}: looking for {SILENCE_S:.0f} s whether it still is")
        time.sleep(SILENCE_S)
        return heartbeat(self.path.parent) == before


def _try_flock(descriptor: int) -> bool | None:
    """True if taken, False if another process has it, None where the filesystem has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _holder(descriptor: int) -> dict[str, Any] | None:
    try:
        holder = json_object(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    pid = holder.get("pid")
    return holder if type(pid) is int and 0 <= pid < 1 << 31 else None


def _write_holder(descriptor: int) -> None:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    os.fsync(descriptor)


def _shown(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    return f"pid {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}"
