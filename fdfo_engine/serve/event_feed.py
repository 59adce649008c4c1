"""Reads a growing `events.jsonl` from any line on, without reading what lies before it."""

from __future__ import annotations

import threading
from pathlib import Path

_LINES_A_MARK = 256


class EventFeed:
    """Lines of the file by number, from 1; from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks = [0]  # where every 256th line begins
        self._lines, self._size = 0, 0
        self._lock = threading.Lock()

    @property
    def last(self) -> int:
        """The number of the last whole line."""
        with self._lock:
            self._look()
            return self._lines

    def read(self, after: int, limit: int) -> list[tuple[int, str]]:
        """At most `limit` whole lines behind number `after`, with their numbers."""
        with self._lock:
            self._look()
            wanted = min(limit, self._lines - after)
            if wanted <= 0:
                return []
            mark = after // _LINES_A_MARK
            with self._path.open("rb") as file:
                file.seek(self._marks[mark])
                for _ in range(after - mark * _LINES_A_MARK):
                    file.readline()
                return [(after + n, file.readline().decode().rstrip("\n")) for n in range(1, wanted + 1)]

    def _look(self) -> None:
        """Counts the lines that have come since."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._size)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._size += len(line)
                self._lines += 1
                if self._lines % _LINES_A_MARK == 0:
                    self._marks.append(self._size)
