"""Checkpoints that a run says it has saved and that are not there: what a run must notice before it starts anew."""

from __future__ import annotations

from pathlib import Path

from fdfo_engine.runtime.checkpoint import CheckpointStore
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.event_log import EVENTS_NAME
from fdfo_engine.runtime.json_text import json_object


def refuse_lost_checkpoints(path: Path, store: CheckpointStore) -> None:
    """Holds the checkpoints of the run in `path` against the last one that its events tell of.

    A newer one that is gone while older ones are there is told as a warning: the run goes on from these.

    Raises:
        CheckpointError: all are gone. Starting from scratch would drop the run's logs too.
    """
    saved, there = last_saved(path), store.names()
    if saved is None or saved in there:
        return
    if not there:
        raise CheckpointError(
            f"{store.folder}: no checkpoint is there, and {path / EVENTS_NAME} says that {saved} was saved; bring it "
            f"back, or choose another run.dir. To begin again from nothing, remove {path}"
        )
    if saved > there[-1]:
        warn(f"{store.folder}: {saved}, which the run has saved, is gone; it goes on from {there[-1]}")


def last_saved(path: Path) -> str | None:
    """The name of the last checkpoint that the events of the run in `path` tell of; damaged lines are passed over."""
    file, name = path / EVENTS_NAME, None
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        for line in lines:
            if b'"checkpoint"' in line:
                name = _checkpoint_of(line) or name
    return name


def _checkpoint_of(line: bytes) -> str | None:
    try:
        event = json_object(line)
        name = event["data"]["name"] if event["type"] == "checkpoint" else None
    except (ValueError, TypeError, KeyError):
        return None
    return name if isinstance(name, str) else None
