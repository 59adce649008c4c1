"""What the evidence benchmarks share: the reward of a rollout, and results that are kept one by one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.evidence_tasks import Score
from fdfo_engine.bench.record import header, write
from fdfo_engine.trajectory import Rollout


def scored(score: Score, texts: Sequence[str], rollout: Rollout) -> Tensor:
    """Scores `[P, 2]` of both images of every prompt."""
    return score([text for text in texts for _ in range(2)], rollout.images.flatten(0, 1)).view(-1, 2)


def kept(out: Path, part: str) -> dict[str, Any]:
    """Records of the file so far, by name."""
    found: dict[str, Any] = json.loads(out.read_text())[part] if out.exists() else {}
    return found


def keep(out: Path, program: str, part: str, name: str, record: dict[str, Any], **about: Any) -> None:
    """Adds a record to the file, with the code and the machine that made it; a kill leaves the file as it was."""
    head = header(program, sys.argv[1:])
    records = kept(out, part) | {name: record | {"commit": head["commit"]}}
    partial = out.with_suffix(".partial")
    write(partial, head | about | {part: records})
    partial.rename(out)
