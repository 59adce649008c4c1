"""Stopping on request: a signal only sets a flag, and the loop acts on it where that is safe."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, by SIGINT, or by the death of its parent.

    The parent counts because a killed launcher leaves its ranks behind. A context manager: handlers are installed on
    entry (only possible in the main thread; elsewhere only the parent is watched) and restored on exit. The flag is
    this rank's own: agree on it with `any_rank(stop.poll())` at a micro-step boundary.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._parent = os.getppid()
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for, as far as known; `poll` also looks at the parent."""
        return self.reason is not None

    def poll(self) -> bool:
        """Looks whether the parent is still the one this process started under; returns `requested`."""
        if self.reason is None and os.getppid() != self._parent:
            self.reason = f"the parent process {self._parent} is gone"
        return self.requested

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        """A launcher repeats its signals, so a second one changes nothing."""
        self.reason = self.reason or signal.Signals(number).name
