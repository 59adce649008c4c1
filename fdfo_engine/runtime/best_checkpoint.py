"""Which checkpoint of a run was best by its held-out reward: it is kept beside the newest."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.durable import replace_file, sealed_json, unsealed_json

BEST_NAME = "best.json"
_SEAL = "sha256"


@dataclass(frozen=True)
class Best:
    """A checkpoint and what its evaluation gave.

    Attributes:
        name: the checkpoint's.
        reward: the held-out reward, a mean over images.
        stderr: its standard error.
    """

    name: str
    reward: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.name}, held-out reward {self.reward:.4g} ±{self.stderr:.2g}"


def read_best(run_dir: Path | str) -> Best | None:
    """The best so far of the run in `run_dir`; None where nothing was evaluated, or, with a warning, it is damaged."""
    path = Path(run_dir) / BEST_NAME
    if not path.is_file():
        return None
    try:
        return Best(**unsealed_json(path, _SEAL))
    except (OSError, ValueError, TypeError) as error:
        warn(f"which checkpoint was best is not known any more: {error}")
        return None


def note_best(run_dir: Path | str, candidate: Best) -> bool:
    """Keeps `candidate`, a committed checkpoint, if nothing was better so far; whether it is the best now.

    Raises:
        CheckpointError: the storage refuses.
    """
    best = read_best(run_dir)
    if not math.isfinite(candidate.reward) or (best is not None and best.reward >= candidate.reward):
        return False
    replace_file(Path(run_dir) / BEST_NAME, sealed_json(asdict(candidate), _SEAL))
    return True


def forget_best(run_dir: Path | str, after: str) -> None:
    """The run goes on from checkpoint `after`: a best one of later is gone with what followed."""
    best = read_best(run_dir)
    if best is not None and best.name > after:
        (Path(run_dir) / BEST_NAME).unlink(missing_ok=True)
