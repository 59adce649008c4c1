"""What goes on beside the main thread: several times a second, as long as a block of code runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

EVERY_S = 0.25


class Ticker:
    """A context manager; within it a thread calls every action again and again. They must not raise."""

    def __init__(self, *actions: Callable[[], None]) -> None:
        self._actions = actions
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ticker", daemon=True)

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            for action in self._actions:
                action()
