"""Files that come with the package for people to read and copy: configs, cluster files, examples."""

from __future__ import annotations

import difflib
from pathlib import Path

from fdfo_engine.config.load import bundled_configs, shipped_folder
from fdfo_engine.config.problems import ConfigError

_FOLDERS = {"cluster": "configs/cluster", "examples": "examples"}
"""What stands before a file's name, and its folder in a checkout and in the package."""


def further_files() -> dict[str, Path]:
    """Name and file of everything but configs: `cluster/slurm.sbatch`, `examples/reward_server.py` and so on."""
    files = {}
    for prefix, place in _FOLDERS.items():
        folder = shipped_folder(place)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                files[f"{prefix}/{path.relative_to(folder).as_posix()}"] = path
    return files


def shipped_file(name: str) -> Path:
    """The config, or other file, of that name.

    Raises:
        ConfigError: there is none; names the nearest, and all configs.
    """
    files = bundled_configs() | further_files()
    if name in files:
        return files[name]
    near = difflib.get_close_matches(name, files, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError([f"{name}: no such config; {hint}takes {', '.join(bundled_configs())}"])


def first_comment(file: Path) -> str:
    """What a config says of itself: its first comment, as far as the first sentence."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).split(". ")[0].rstrip(".")
