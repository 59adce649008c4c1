"""Stopping on request: a signal only sets a flag, and the loop acts on it where that is safe."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

AGAIN_S = 1.0
"""A launcher repeats signals within a moment; a person who presses Ctrl-C once more takes longer."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, by SIGINT, or by the death of its parent.

    The parent counts because a killed launcher leaves its ranks behind. A context manager: handlers are installed on
    entry (only possible in the main thread; elsewhere only the parent is watched) and restored on exit. The flags are
    this rank's own: ranks agree on them where they agree on errors.

    Attributes:
        reason: why, or None while nobody asked.
        is_urgent: Ctrl-C was pressed again: what is being done is not to be finished.
        raises: whether Ctrl-C pressed again raises KeyboardInterrupt: while nothing can be lost.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.is_urgent = False
        self.raises = True
        self._interrupted_s: float | None = None
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
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:
            self._note_interrupt()

    def _note_interrupt(self) -> None:
        now = time.monotonic()
        if self._interrupted_s is None:
            self._interrupted_s = now
        elif now - self._interrupted_s >= AGAIN_S:
            self.is_urgent = True
            if self.raises:
                raise KeyboardInterrupt
