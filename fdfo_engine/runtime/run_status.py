"""`status.json`: the truth about a run for frontends, since launchers misreport exit codes."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fdfo_engine.runtime import events
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.durable import plain_json, replace_file
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.json_text import json_object
from fdfo_engine.runtime.process import is_alive

STATUS_NAME = "status.json"
HEARTBEAT_S = 3.0


class RunStatus:
    """Writes `status.json` of a run folder, replaced atomically each time; a listener of a run's events.

    Keys: `state`, `exit_code` (null until the end), `message`, `epoch`, `epochs`, `last_checkpoint`; of what is being
    done `phase`, `done`, `total`, `unit`, `eta_s`; of the last epoch `reward_mean` and `images_per_second`; `pid`,
    `host`. `heartbeat` is when the process last said that it lives, `progress_at` when anything last moved, both in
    seconds since 1970: a fresh heartbeat beside an old `progress_at` is a process that lives and does not get on. Only
    the process that holds the folder's lock may write it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATUS_NAME
        self._lock = threading.RLock()
        self._fields: dict[str, Any] = {
            "state": "starting", "exit_code": None, "message": "", "epoch": 0, "epochs": None, "last_checkpoint": None,
            "phase": None, "done": None, "total": None, "unit": None, "eta_s": None, "reward_mean": None,
            "images_per_second": None, "progress_at": time.time(),
        }  # fmt: skip
        self._written = float("-inf")

    @classmethod
    def taken_over(cls, folder: Path) -> RunStatus | None:
        """Goes on with what another process wrote, which is gone; None where it wrote how the run ended, or nothing."""
        try:
            stored = read_status(folder)
        except ValueError:
            stored = {}  # a damaged one: it is written anew
        if stored is None or stored.get("exit_code") is not None:
            return None
        status = cls(folder)
        status._fields |= {name: value for name, value in stored.items() if name in status._fields}
        return status

    def update(self, state: events.RunState | None = None, **fields: Any) -> None:
        """Writes the status with `state` and `fields` changed: `exit_code`, `message`, `epoch`, `epochs`, ...

        Raises:
            CheckpointError: the storage refuses.
        """
        with self._lock:
            self._change(fields if state is None else {"state": state} | fields)
            record = self._fields | {"heartbeat": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
            self._written = time.monotonic()  # where that fails it is not tried again at once
            replace_file(self.path, json.dumps(plain_json(record), indent=1).encode())

    def field(self, name: str) -> Any:
        """What was last written under `name`."""
        return self._fields[name]

    def beat(self) -> None:
        """Renews the heartbeat if it is older than three seconds; from any thread."""
        if time.monotonic() - self._written > HEARTBEAT_S:
            with self._lock:
                self._write_or_warn({"progress_at": self._fields["progress_at"]})

    def __call__(self, event: events.Event) -> None:
        """Takes the event in. Progress within a phase is written with the next beat, all else at once."""
        fields = _told(event.data)
        if isinstance(event.data, events.Checkpoint):  # which may be of an epoch ago: it is written beside the training
            fields["epoch"] = max(self._fields["epoch"], event.data.epoch)
        with self._lock:
            if fields.get("phase") is not None and fields["phase"] == self._fields["phase"]:
                self._change(fields)
            elif fields:
                self._write_or_warn(fields)

    def _change(self, fields: dict[str, Any]) -> None:
        unknown = fields.keys() - self._fields.keys()
        assert not unknown, f"status.json has no {sorted(unknown)}"
        self._fields |= {"progress_at": time.time()} | fields

    def _write_or_warn(self, fields: dict[str, Any]) -> None:
        """It is one rank's, amid what all do together: where it fails, the next real write fails for all."""
        try:
            self.update(**fields)
        except CheckpointError as error:
            warn(f"no status: {error}")


_NO_PHASE = {"phase": None, "done": None, "total": None, "unit": None, "eta_s": None}


def _told(data: events.AnyData) -> dict[str, Any]:
    """The fields that an event sets. How a run ended comes with its last event: then the exit code is there too."""
    match data:
        case events.State(state="starting" | "running" | "paused"):
            return {
                "state": data.state,
                "epoch": data.epoch,
                "epochs": data.epochs,
                "message": data.message,
                **_NO_PHASE,
            }
        case events.State():
            return {"message": data.message}
        case events.Phase():
            return {"phase": data.name, "done": data.done, "total": data.total, "unit": data.unit, "eta_s": data.eta_s}
        case events.Metrics(kind="epoch"):
            known = {name: data.values.get(name) for name in ("reward_mean", "images_per_second")}
            return {"epoch": data.epoch, **known, **_NO_PHASE}
        case events.Checkpoint():
            return {"last_checkpoint": data.name}
        case events.Done():
            ended = {"state": data.state, "exit_code": data.exit_code}
            return ended | (_NO_PHASE if data.state == "finished" else {})
    return {}


def heartbeat(folder: Path | str) -> float | None:
    """When the process of the run in `folder` last said that it lives, by its own clock; None where nothing is said."""
    try:
        found = json_object((Path(folder) / STATUS_NAME).read_bytes()).get("heartbeat")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, float) else None


def read_status(folder: Path | str) -> dict[str, Any] | None:
    """`status.json` of a run folder, or None without one.

    A run that says it is starting or running, but whose process is gone from this host, has the state `died`.

    Raises:
        ValueError: it is damaged.
    """
    path = Path(folder) / STATUS_NAME
    if not path.is_file():
        return None
    status = json_object(path.read_bytes())
    read = _Read.model_validate(status)
    unfinished = read.state in ("starting", "running", "paused")
    if unfinished and read.host == socket.gethostname() and not is_alive(read.pid):
        status["state"] = "died"
    return status


class _Read(BaseModel):
    """What readers of a status rely on."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    state: str = ""
    host: str = ""
    pid: int = Field(default=0, ge=0, lt=1 << 31)
    exit_code: int | None = None
    heartbeat: float = Field(default=0.0, ge=0)
    phase: str | None = None
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    eta_s: float | None = None
    reward_mean: float | None = None
