"""What a reward must leave as it was: it is called in the process of the run, and anybody's code may be one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from fdfo_engine.runtime.errors import RewardError

T = TypeVar("T")


def left_as_it_was(name: str, call: Callable[[], T]) -> T:
    """`call()`, after which the working folder, torch's default dtype and the standard streams are what they were.

    Raises:
        RewardError: one is not; it is put back, and the message says which. The run wrote and computed by it
            meanwhile.
    """
    folder, dtype, streams = _folder(), torch.get_default_dtype(), (sys.stdout, sys.stderr)
    try:
        return call()
    finally:
        changed = []
        if folder is not None and _folder() != folder:
            changed.append(f"the working folder, to {_folder()}")
            os.chdir(folder)
        if torch.get_default_dtype() != dtype:
            changed.append(f"torch's default dtype, to {torch.get_default_dtype()}")
            torch.set_default_dtype(dtype)
        if closed := [stream for stream in streams if getattr(stream, "closed", False)]:
            changed.append(f"{' and '.join(stream.name for stream in closed)}: closed")
        if changed:
            raise RewardError(
                f"reward {name!r} has changed {'; '.join(changed)}: a reward must leave such things alone"
            )


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None
