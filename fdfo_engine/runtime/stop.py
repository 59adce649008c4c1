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
from fdfo_engine.runtime.starting import starters, stop_signals

AGAIN_S = 1.0
"""A launcher repeats signals within a moment; a person who presses Ctrl-C once more takes longer."""

GRACE_S = 20.0
"""How long a stop may wait for what is being done. Launchers and clusters kill 30 s after SIGTERM, and saving takes
time too."""


class StopRequest:
    """Whether this process was asked to stop: by a signal, or by the death of what started it (`starting.starters`).

    A context manager: handlers are installed on entry (only possible in the main thread; elsewhere only the starters
    are watched) and restored on exit. The flags are this rank's own: ranks agree on them where they agree on errors.

    Attributes:
        reason: why, or None while nobody asked.
        is_urgent: Ctrl-C was pressed again: what is being done is not to be finished.
        is_patient: a person asked, by Ctrl-C alone: nobody kills the process if it takes its time.
        raises: whether Ctrl-C pressed again raises KeyboardInterrupt: while nothing can be lost.
        leaves_at_once: whether any other signal raises Stopped: likewise, and while no other rank waits for an answer.
    """

    def __init__(self, *, leaves_at_once: bool = False) -> None:
        self.reason: str | None = None
        self.is_urgent = False
        self.raises = True
        self.leaves_at_once = leaves_at_once
        self._hurries = False
        self._interrupted_s: float | None = None
        self._starters = starters()
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for, as far as known; `poll` also looks at what started this process."""
        return self.reason is not None

    @property
    def is_patient(self) -> bool:
        """See the class."""
        return self.requested and not self._hurries

    def poll(self) -> bool:
        """Looks whether what started this process is still there; returns `requested`."""
        gone = next((process for process in self._starters if process.is_gone()), None)
        if gone is not None and not self._hurries:
            self._hurries = True
            nearest = gone is self._starters[0]
            what = f"the parent process {gone.pid}" if nearest else f"process {gone.pid} ({gone.name}) of the launcher"
            self.reason = self.reason or f"{what} is gone"
            if self.leaves_at_once:
                os.kill(os.getpid(), signal.SIGTERM)  # this may be another thread than the main one
        return self.requested

    def begin(self) -> None:
        """From here on there is something to lose: signals only set flags."""
        self.raises = self.leaves_at_once = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in stop_signals()}
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
            return
        self._hurries = True
        if self.leaves_at_once:
            raise Stopped(f"{self.reason}: stopped before the first epoch")

    def _note_interrupt(self) -> None:
        now = time.monotonic()
        if self._interrupted_s is None:
            self._interrupted_s = now
        elif now - self._interrupted_s >= AGAIN_S:
            self.is_urgent = True
            if self.raises:
                raise KeyboardInterrupt

    def lets_finish(self, eta_s: float | None) -> bool:
        """Whether an update that takes `eta_s` more seconds, None where that is not known, is carried to its end."""
        if self.is_urgent:
            return False
        return self.is_patient or (eta_s is not None and eta_s <= GRACE_S)


class Stopping:
    """Acts on a stop request: cancels at once what can be done again to the bit, and an update that takes too long."""

    def __init__(self, progress: Progress, request: StopRequest) -> None:
        """`look` becomes the poll of `progress`. From here on there is something to lose."""
        self._progress, self._request = progress, request
        self._looked_s = time.monotonic()
        self._longest_s = 0.0
        request.begin()
        progress.poll = self.look

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._request.poll()

    def look(self) -> None:
        """Between two parts of work."""
        now = time.monotonic()
        self.took(now - self._looked_s)
        self._looked_s = now
        if not self.is_asked():
            return
        phase = self._progress.current
        is_update = phase is not None and phase.name == "update"
        if not (is_update and phase is not None and self._request.lets_finish(phase.eta_s)):
            self._progress.cancel(self._request.reason or "")

    def took(self, seconds: float) -> None:
        """Something took so long that a stop cannot end in the middle of it without a loss."""
        self._longest_s = max(self._longest_s, seconds)

    @property
    def comes_late(self) -> bool:
        """Whether a stop may come too late to save: then every epoch is saved as soon as it is done. Collective."""
        return any_rank(self._longest_s > GRACE_S)

    def stop_between_epochs(self) -> None:
        """Raises Stopped on all ranks if any was asked to; collective."""
        if any_rank(self.is_asked()):
            reason = self._request.reason or "asked on another rank"
            raise Stopped(f"{reason}: stopped after epoch {self._progress.epoch}")
