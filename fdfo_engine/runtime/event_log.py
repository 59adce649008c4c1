"""`events.jsonl`: a run's events, one a line, for whoever watches; the number of a line is its `seq`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fdfo_engine.runtime.durable import append_whole, replace_file, storage_error
from fdfo_engine.runtime.events import Event, parse_event
from fdfo_engine.runtime.json_text import json_object

EVENTS_NAME = "events.jsonl"
_PASSING = ("phase", "pair")
"""They are not synced one by one: after a power failure the last of them may be missing, after a kill none is."""


class EventLog:
    """Appends events to `events.jsonl` of a run folder; a listener of an `EventStream`. One process at a time."""

    def __init__(self, folder: Path) -> None:
        """Goes on where the file ends; a half-written last line is dropped.

        Raises:
            CheckpointError: the storage refuses.
        """
        self.path = folder / EVENTS_NAME
        try:
            data = self.path.read_bytes() if self.path.is_file() else b""
            self._size = data.rfind(b"\n") + 1
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, self._size)
        except OSError as error:
            raise storage_error(self.path, error) from error
        self.last_seq = data.count(b"\n")

    def __call__(self, event: Event) -> None:
        """Writes the event that follows the last line. Of any other number it is not written: a gap would pass unseen.

        So after a write that failed the file stays as it is until a process opens it anew.

        Raises:
            CheckpointError: the storage refuses; the file ends where it ended.
        """
        if event.seq != self.last_seq + 1:
            return
        line = event.line()
        try:
            append_whole(self._file, line, self._size, synced=event.type not in _PASSING)
        except OSError as error:
            raise storage_error(self.path, error) from error
        self._size += len(line)
        self.last_seq = event.seq

    def close(self) -> None:
        """Nothing is written after it."""
        os.close(self._file)
        self.last_seq = -2


def truncate_events(folder: Path, epoch: int) -> None:
    """Cuts the file before the first line that is no event of its number, or that tells of an epoch after `epoch`.

    What follows such a line belongs to a time that did not come to stay, as do the lines that other logs drop.
    """
    path = folder / EVENTS_NAME
    if not path.is_file():
        return
    data = path.read_bytes()
    kept = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if not _belongs(line, number, epoch):
            break
        kept += len(line)
    if kept < len(data):
        replace_file(path, data[:kept])


def read_events(folder: Path | str, after: int = 0) -> Iterator[Event]:
    """The whole events of a run with a `seq` above `after`, oldest first; none where no file is.

    Raises:
        pydantic.ValidationError: a line is no event of this version.
    """
    path = Path(folder) / EVENTS_NAME
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number > after and line.endswith(b"\n"):
                yield parse_event(line)


def _belongs(line: bytes, number: int, epoch: int) -> bool:
    """Looks at no more than it needs: types of a later version stay."""
    if not line.endswith(b"\n"):
        return False
    try:
        record = json_object(line)
        return bool(record["seq"] == number and record["data"]["epoch"] <= epoch)
    except (ValueError, TypeError, KeyError):
        return False
