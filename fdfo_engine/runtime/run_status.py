"""`status.json`: the truth about a run for frontends, since launchers misreport exit codes."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from fdfo_engine.runtime.durable import plain_json, replace_file
from fdfo_engine.runtime.run_lock import is_alive

STATUS_NAME = "status.json"
HEARTBEAT_S = 10.0
State = Literal["starting", "running", "finished", "failed", "stopped"]


class RunStatus:
    """Writes `status.json` of a run folder, replaced atomically each time.

    Keys: `state`, `exit_code` (null until the end), `message`, `epoch`, `epochs`, `last_checkpoint`, `phase`,
    `heartbeat` (seconds since 1970), `pid`, `host`. Only the process that holds the folder's lock may write it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATUS_NAME
        self._fields: dict[str, Any] = {
            "state": "starting", "exit_code": None, "message": "", "epoch": 0, "epochs": None, "last_checkpoint": None,
            "phase": None,
        }  # fmt: skip
        self._written = float("-inf")

    def update(self, state: State | None = None, **fields: Any) -> None:
        """Writes the status with `state` and `fields` changed: `exit_code`, `message`, `epoch`, `epochs`, ...

        Raises:
            CheckpointError: the storage refuses.
        """
        unknown = fields.keys() - self._fields.keys()
        assert not unknown, f"status.json has no {sorted(unknown)}"
        self._fields |= fields if state is None else {"state": state} | fields
        record = self._fields | {"heartbeat": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
        replace_file(self.path, json.dumps(plain_json(record), indent=1).encode())
        self._written = time.monotonic()

    def beat(self) -> None:
        """Renews the heartbeat if it is older than ten seconds; cheap enough for every micro-step."""
        if time.monotonic() - self._written > HEARTBEAT_S:
            self.update()


def read_status(folder: Path | str) -> dict[str, Any] | None:
    """`status.json` of a run folder, or None without one.

    A run that says it is starting or running, but whose process is gone from this host, has the state `died`.
    """
    path = Path(folder) / STATUS_NAME
    if not path.is_file():
        return None
    status: dict[str, Any] = json.loads(path.read_text())
    unfinished = status.get("state") in ("starting", "running")
    if unfinished and status.get("host") == socket.gethostname() and not is_alive(int(status.get("pid", 0))):
        status["state"] = "died"
    return status
