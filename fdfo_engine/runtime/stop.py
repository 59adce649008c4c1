"""Stopping on request: a signal only sets a flag, and the loop acts on it where that is safe."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from fdfo_engine.runtime.distributed import any_rank
from fdfo_engine.runtime.errors import Stopped
from fdfo_engine.runtime.progress import Progress

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


class Stopping:
    """Acts on a stop request: cancels at once what can be done again to the bit; an update only if it is urgent."""

    def __init__(self, progress: Progress, request: StopRequest) -> None:
        """`look` becomes the poll of `progress`. From here on there is something to lose."""
        self._progress, self._request = progress, request
        self._request.raises = False
        progress.poll = self.look

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._request.poll()

    def look(self) -> None:
        """Between two parts of work."""
        phase = self._progress.current
        is_update = phase is not None and phase.name == "update"
        if self.is_asked() and (self._request.is_urgent or not is_update):
            self._progress.cancel(self._request.reason or "")

    def stop_between_epochs(self) -> None:
        """Raises Stopped on all ranks if any was asked to; collective."""
        if any_rank(self.is_asked()):
            reason = self._request.reason or "asked on another rank"
            raise Stopped(f"{reason}: stopped after epoch {self._progress.epoch}")
