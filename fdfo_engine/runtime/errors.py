"""Errors a user can act on, one class an exit code.

A subclass of `FdfoError` is the user's to mend: its message says what was wrong, where, and what to do. Anything else
that reaches the top is a bug of ours. `ConfigError` (exit 2) lives in `fdfo_engine.config`, which imports no runtime;
whatever bears an integer `exit_code` is reported the same way.
"""

from __future__ import annotations

import errno
import os
import traceback
from typing import ClassVar

from fdfo_engine.runtime.console import complain
from fdfo_engine.runtime.masking import masked

_OF_STORAGE = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM,
        errno.EMFILE, errno.ENFILE, errno.ENOTCONN, errno.ENODEV,
    }
)  # fmt: skip
"""What a storage refuses with, and a process that has no file handles left."""

_ISSUE_HINT = "this is a bug in fdfo_engine: please report it with the lines above"
_OUT_OF_MEMORY = (
    "out of memory: {first_line}\n"
    "lower update.micro_batch or sampling.block_pairs, or set model.gradient_checkpointing: true"
)


class FdfoError(Exception):
    """A failure with a message for the user; `exit_code` is the process's exit status."""

    exit_code: ClassVar[int] = 1


class UsageError(FdfoError):
    """A wrong command, option or setting, or a run folder made with other settings."""

    exit_code = 2


class EnvironmentProblem(FdfoError):  # noqa: N818 - EnvironmentError is a builtin
    """A missing library, device or file of the installation, or too little memory."""

    exit_code = 3


class PromptError(FdfoError):
    """Prompts or other data that cannot be read or used."""

    exit_code = 4


class RewardError(FdfoError):
    """A reward that cannot be reached, returns the wrong shape, or fails too often."""

    exit_code = 5


class GuardStop(RewardError):  # noqa: N818 - a rule that was followed, not an error
    """`evaluation.guard` stopped the run: its reward is pleased at the expense of the images."""


class NumericsError(FdfoError):
    """NaN or infinity where training cannot go on."""

    exit_code = 6


class CheckpointError(FdfoError):
    """A checkpoint that cannot be written, found, verified or used; storage that fails."""

    exit_code = 7


class DistributedError(FdfoError):
    """Ranks that do not start, do not answer or do not agree."""

    exit_code = 8


class Stopped(FdfoError):  # noqa: N818 - a request that was followed, not an error
    """The run stopped on request and can be resumed by the same command."""

    exit_code = 75


class Cancelled(Stopped):
    """`Engine.cancel` ended the call that raises it."""


def of_exit_code(code: int, message: str) -> FdfoError:
    """An error that another process told of: of the class that has `code`."""
    classes: dict[int, type[FdfoError]] = {c.exit_code: c for c in FdfoError.__subclasses__()}
    return classes.get(code, FdfoError)(message)


def exit_code(error: BaseException) -> int:
    """Exit status for `error`: its own `exit_code`, 3 for memory, 7 for storage, 75 for Ctrl-C, else 1."""
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return own
    if _is_out_of_memory(error):
        return EnvironmentProblem.exit_code
    if is_peer_loss(error):
        return DistributedError.exit_code
    if isinstance(error, OSError) and error.errno in _OF_STORAGE:
        return CheckpointError.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Stopped.exit_code
    return 1


def error_message(error: BaseException) -> str:
    """What to tell the user about `error`, for the terminal and for `status.json`; no secret of the environment."""
    return masked(_message(error))


def _message(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if _is_out_of_memory(error):
        return _OUT_OF_MEMORY.format(first_line=text.splitlines()[0])
    if is_peer_loss(error):
        return f"another rank is gone, or does not answer; its own output says why ({text.splitlines()[0]})"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.errno in _OF_STORAGE:
        return f"{error.filename or 'the storage'}: {error.strerror}"
    return text if hasattr(error, "exit_code") else f"{type(error).__name__}: {text}"


def report_and_exit_code(error: BaseException) -> int:
    """Prints one block about `error` to stderr and returns the exit status.

    The traceback is printed for a bug of ours (status 1), and for every error if `FDFO_DEBUG=1`. Rank 0 speaks for all
    but for what can meet one rank alone: a bug, memory, and the loss of another rank, which may be rank 0.
    """
    code, lines = exit_code(error), []
    everywhere = code in (1, DistributedError.exit_code) or _is_out_of_memory(error)
    if code == 1 or os.environ.get("FDFO_DEBUG") == "1":
        lines.append("".join(traceback.format_exception(error)).rstrip())
    label = "stopped" if code == Stopped.exit_code else "error"
    lines.append(f"{label}: {error_message(error)}" + (f"\n{_ISSUE_HINT}" if code == 1 else ""))
    complain("\n".join(lines), everywhere=everywhere)
    return code


def is_peer_loss(error: BaseException) -> bool:
    """Whether a collective failed since another rank is gone: our own and DeepSpeed's alike, by torch's error for it.

    Gloo raises a plain RuntimeError, which its source's path tells from others.
    """
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):
        return True
    return isinstance(error, RuntimeError) and "/gloo/transport/" in str(error)


def _is_out_of_memory(error: BaseException) -> bool:
    """By name: torch.OutOfMemoryError is not worth importing torch for."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
