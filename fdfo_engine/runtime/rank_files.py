"""What each rank says of itself while a run of several ranks goes on: a small file a rank, under `ranks/` of the run.

A file outlives its process and its host, and can be read while the process is stopped. It is written in place, at a
fixed size: that takes no room on a full disk, and leaves nothing behind when it is killed.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fdfo_engine.runtime.json_text import json_object

FOLDER_NAME = "ranks"
_BYTES = 4096
_TEXT_CHARACTERS = 600


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Attributes:
        pid: the process.
        beat: a number that grows as long as its threads run.
        place: its phase, and how far it is.
        still_s: for how long the engine's thread has not got on.
        waits: whether that thread waits for other ranks.
        stuck: why it does not get on, where it has given itself up.
        has_left: whether it has left the run, by its end or by an error.
    """

    pid: int
    beat: int
    place: str
    still_s: float = 0.0
    waits: bool = False
    stuck: str = ""
    has_left: bool = False


class RankFile:
    """Where this rank writes its signs."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        """Opens the file; raises OSError where that cannot be."""
        folder = run_dir / FOLDER_NAME
        folder.mkdir(exist_ok=True)
        self._descriptor = os.open(_sign_path(run_dir, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        self.stacks = stacks_path(run_dir, rank).open("w")

    def write(self, sign: Sign) -> None:
        """Replaces the sign; raises OSError where the storage refuses."""
        cut = asdict(sign) | {"place": sign.place[:_TEXT_CHARACTERS], "stuck": sign.stuck[:_TEXT_CHARACTERS]}
        os.pwrite(self._descriptor, json.dumps(cut).encode().ljust(_BYTES), 0)

    def close(self) -> None:
        """Leaves the sign where it is; a file of stacks that has none goes."""
        os.close(self._descriptor)
        self.stacks.close()
        path = Path(self.stacks.name)
        if path.is_file() and not path.stat().st_size:
            path.unlink()


def stacks_path(run_dir: Path, rank: int) -> Path:
    """Where the stacks of a rank that hangs are."""
    return run_dir / FOLDER_NAME / f"rank_{rank:04d}_stacks.txt"


def read_sign(run_dir: Path, rank: int, pid: int) -> Sign | None:
    """The last sign of process `pid` as `rank`; None where there is none, or one that is just being written."""
    try:
        sign = Sign(**json_object(_sign_path(run_dir, rank).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return sign if sign.pid == pid else None


def _sign_path(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER_NAME / f"rank_{rank:04d}.json"
