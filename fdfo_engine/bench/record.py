"""Where a number comes from: the header of every file of results, and its writing."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fdfo_engine.runtime.environment import describe_environment

PLACES = ("--out", "--runs")
_CHECKOUT = Path(__file__).resolve().parents[2]


def header(program: str, words: Sequence[str]) -> dict[str, Any]:
    """The command (`program` with `words`), day, commit, and what in the tree differs from it, machine and versions.

    Of an installed wheel there is no commit to tell, and its version stands among those of the packages.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": command(program, words),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": changes.splitlines(),
        "environment": {key: value for key, value in describe_environment().items() if key != "host"},
    }


def command(name: str, words: Sequence[str]) -> str:
    """What makes the file again: `name` with `words`, but where files go."""
    kept = [word for i, word in enumerate(words) if not word.startswith(PLACES) and words[max(i - 1, 0)] not in PLACES]
    return " ".join([name, *kept])


def machine(device: torch.device) -> str:
    """Folder of this kind of machine's results: the GPU's name, or the processor's architecture."""
    if device.type == "cpu":
        return f"cpu_{platform.machine()}"
    return torch.cuda.get_device_name(device).lower().replace("nvidia", "").strip().replace(" ", "_")


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _git(*words: str) -> str:
    if not (_CHECKOUT / ".git").exists():
        return ""
    return subprocess.run(["git", *words], cwd=_CHECKOUT, capture_output=True, text=True, check=False).stdout.strip()
