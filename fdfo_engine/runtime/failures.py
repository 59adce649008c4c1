"""What is told of an exception in code that a user brought: its cause, and the place in that code."""

from __future__ import annotations

import importlib
import sysconfig
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

_PACKAGE = Path(__file__).resolve().parent.parent
_CALLERS = {
    importlib.__file__, str(_PACKAGE / "runtime/own_code.py"),
    *(str(_PACKAGE / f"rewards/{name}.py") for name in ("weighted", "isolated", "manners", "registry", "reward")),
}  # fmt: skip
"""Files whose frames only lead to the user's code."""

_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Failure:
    """An exception as text, which may have come from another process."""

    cause: str
    """Its type and message, on one line."""

    place: str
    """File, line and function of the innermost frame that is no library's; empty where there is none."""

    trace: str
    """The traceback from the user's own code on."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Of `error` as it was caught; of a `FailedElsewhereError` what it was there."""
        if isinstance(error, FailedElsewhereError):
            return error.failure
        text = " ".join(str(error).split())
        cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
        own = _from_own_code(error.__traceback__)
        trace = traceback.format_exception(type(error), error, own or error.__traceback__)
        return cls(cause, _place(error, own), "".join(trace))

    def __str__(self) -> str:
        return f"{self.cause} ({self.place})" if self.place else self.cause

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


class FailedElsewhereError(RuntimeError):
    """What ran in another process raised there."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure


def _from_own_code(trace: TracebackType | None) -> TracebackType | None:
    """Without the leading frames that only lead to it; None where there are no others."""
    while trace is not None and _only_calls(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _only_calls(file: str) -> bool:
    return file in _CALLERS or file.startswith("<frozen importlib") or file.endswith("torch/utils/_contextlib.py")


def _place(error: BaseException, trace: TracebackType | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(trace) if not f.filename.startswith((*_LIBRARIES, "<"))]
    return f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else ""
