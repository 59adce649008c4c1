"""Whose a process is, whether it lives, and how one of several ranks ends."""

import atexit
import contextlib
import os
import sys
from typing import NoReturn

_is_ours = False


def claim_process() -> None:
    """Says that this process runs nothing but our command: it may be ended from any thread."""
    global _is_ours
    _is_ours = True


def is_ours() -> bool:
    """Whether `claim_process` was called; else somebody's own program is around us."""
    return _is_ours


def is_alive(pid: int) -> bool:
    """Whether a process of this host has the id `pid`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def end_process(status: int) -> NoReturn:
    """Ends this process with `status`; exit functions run and output is flushed, but the interpreter is not finalised.

    A gloo thread may still hold the tensor of the last collective when the main thread is done. To drop it, the thread
    asks for the interpreter's lock, and where it asks during finalisation, CPython 3.11 ends it in a way that aborts
    the process: "terminate called without an active exception", status 134 in place of ours. Waiting for these threads
    is not possible from Python (DeepSpeed keeps the group alive). So: the last call of a script that ran collectives,
    behind `close_distributed`.
    """
    try:
        with contextlib.suppress(SystemExit):
            sys.exit(status)  # trackers such as wandb learn the status from this call, before their exit functions run
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its reader has gone, or it is closed: nobody to tell
                stream.flush()
    finally:
        os._exit(status)
