"""How far the engine is: told as events, and the points between two parts of work where it can be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fdfo_engine.runtime import events, pulse
from fdfo_engine.runtime.distributed import is_main, on_main, together
from fdfo_engine.runtime.errors import Cancelled

_EVERY_PART = 50
_EVERY_S = 1.0
_OF_THE_NEXT_EPOCH = ("prompts", "rollout", "reward", "update")
_DOING: dict[str, str] = {
    "prompts": "while prompts were encoded",
    "rollout": "while pairs were sampled",
    "reward": "while images were scored",
    "update": "amid the update",
    "evaluation": "while images were evaluated",
    "scoring": "while images were evaluated",
    "generation": "while images were generated",
}


class Progress:
    """Tells on rank 0 what is being done; lets every rank stop between two parts of it.

    Attributes:
        stream: where events go; on rank 0 only.
        epoch: epochs done; a rollout and an update belong to the one after it.
        poll: called between blocks, micro-batches and batches, equally often on every rank; may raise to stop.
    """

    def __init__(self, listener: events.Listener | None = None) -> None:
        self.stream = events.EventStream([] if listener is None else [listener])
        self.epoch = 0
        self.poll: Callable[[], None] = _nothing
        self._cancelled: str | None = None
        self._open: Phase | None = None

    def cancel(self, reason: str) -> None:
        """Ends the phase that is open, at the next point between two of its parts; from any thread."""
        self._cancelled = reason

    def tell(self, data: events.AnyData) -> None:
        """Tells an event, on rank 0; collective, so that all ranks learn of a listener's error."""
        on_main(lambda: self.stream.tell(data))

    @property
    def current(self) -> Phase | None:
        """The phase that is open."""
        return self._open

    @contextmanager
    def phase(self, name: events.PhaseName, *, total: int | None = None, unit: str = "images") -> Iterator[Phase]:
        """Opens a phase; within another one it moves that one on instead. Collective, as is its `reach`.

        `total` units are told as done when it ends without an error. What was cancelled before it began is forgotten.
        """
        if self._open is not None:
            yield from self._within(self._open, total)
            return
        self._cancelled = None
        self._open = phase = Phase(self, name, total, unit)
        if name != "loading":  # which has no parts to tell
            pulse.enter_phase(phase.place)
        try:
            yield phase
            together(phase.finish)
        finally:
            self._open = None

    def _within(self, outer: Phase, total: int | None) -> Iterator[Phase]:
        base = outer.base
        yield outer
        outer.base = base + (total or 0)

    def stop_if_cancelled(self, phase: Phase) -> None:
        """Raises Cancelled where this rank was asked to."""
        if self._cancelled is not None:
            raise Cancelled(f"{self._cancelled}: stopped {phase}")


class Phase:
    """One phase in progress."""

    def __init__(self, progress: Progress, name: events.PhaseName, total: int | None, unit: str) -> None:
        self._progress, self.name, self._unit = progress, name, unit
        self._epoch = progress.epoch + (name in _OF_THE_NEXT_EPOCH)
        self.total = total
        self.base = self._done = self._counted = 0
        self._start = self._told_s = time.monotonic()
        self._told: int | None = None
        self._is_over = False
        self._lock = threading.Lock()

    def __str__(self) -> str:
        doing = _DOING.get(self.name, f"in {self.name}")
        return f"{doing}, at {self._done} of {self.total or '?'} {self._unit}"

    def place(self) -> str:
        """The phase and how far it is, for whoever tells of this rank."""
        return f"{self.name}, at {self._done} of {self.total or '?'} {self._unit}"

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the speed so far, where that is known; from any thread."""
        if self.total is None or not self._done:
            return None
        return (self.total - self._done) * (time.monotonic() - self._start) / self._done

    def reach(self, done: int, total: int | None = None) -> None:
        """`done` units are there, and the next part may begin; collective.

        Raises:
            Cancelled: `Progress.cancel` was called.
            Whatever the listener or the poll raises; on the other ranks an error of the same exit code.
        """
        self.total = self.total if total is None else total
        self._done = self.base + done
        try:
            together(self._between)
        except BaseException:
            self._is_over = True
            raise

    def count(self, number: int) -> None:
        """`number` more units are there: from a helper thread, while the caller's thread calls `look`.

        Raises:
            Cancelled: the phase ended, and what the thread does is of no use.
        """
        pulse.got_on()
        with self._lock:
            self._counted += number
        if self._is_over:
            raise Cancelled("the phase was ended")

    def advance(self, number: int) -> None:
        """`number` more units are there; not collective: within an action that ranks take `together`.

        Raises:
            Cancelled, or what the listener raises.
        """
        pulse.got_on()
        self._done += number
        if self._is_news():
            self._tell()
        self._progress.stop_if_cancelled(self)

    def look(self) -> None:
        """As `reach`, for what `count` has counted; collective."""
        self.reach(self._counted if self.total is None else min(self._counted, self.total))

    def finish(self) -> None:
        """Tells that all of it is done, where the last word was not that already."""
        self._done = self._done if self.total is None else self.total
        if self._told != self._done:
            self._tell()

    def _between(self) -> None:
        self._progress.poll()
        if self._is_news():
            self._tell()
        self._progress.stop_if_cancelled(self)

    def _is_news(self) -> bool:
        """The first word, every fiftieth part and every second: a phase of thousands of parts is no flood of events."""
        if self._told is None or not self.total or time.monotonic() - self._told_s >= _EVERY_S:
            return True
        return self._done * _EVERY_PART // self.total > self._told * _EVERY_PART // self.total

    def _tell(self) -> None:
        self._told, self._told_s = self._done, time.monotonic()
        speed = self._done / max(self._told_s - self._start, 1e-6)
        if is_main():
            data = events.Phase(
                epoch=self._epoch, name=self.name, done=self._done, total=self.total, unit=self._unit,
                eta_s=None if self.total is None or not self._done else (self.total - self._done) / speed,
                per_second=speed if self._done else None,
            )  # fmt: skip
            self._progress.stream.tell(data)


def _nothing() -> None:
    pass
