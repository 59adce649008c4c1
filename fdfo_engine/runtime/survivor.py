"""Rank 0 tells how a run ended. Where it is gone, one of the others does."""

from __future__ import annotations

from pathlib import Path

from fdfo_engine.runtime import events
from fdfo_engine.runtime.errors import CheckpointError, DistributedError, UsageError, error_message
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.run_lock import RunLock
from fdfo_engine.runtime.run_status import RunStatus


def speak_for_rank_0(folder: Path, error: DistributedError) -> None:
    """Tells in status.json and events.jsonl that the run in `folder` ended by `error`.

    Nothing where rank 0 has done so or may still do it: it holds the folder's lock as long as it lives.
    """
    lock = RunLock(folder)
    try:
        lock.take()
    except (UsageError, CheckpointError):
        return
    try:
        status = RunStatus.taken_over(folder)
        if status is not None:
            _tell(status, EventLog(folder), error)
    finally:
        lock.release()


def _tell(status: RunStatus, log: EventLog, error: DistributedError) -> None:
    epoch, epochs = status.field("epoch"), status.field("epochs")
    message, code = error_message(error), error.exit_code
    stream = events.EventStream([status, log], last_seq=log.last_seq)
    stream.tell(events.Failure(epoch=epoch, message=message, exit_code=code))
    stream.tell(events.State(epoch=epoch, state="failed", epochs=epochs, message=message))
    stream.tell(events.Done(epoch=epoch, state="failed", exit_code=code))
    log.close()
