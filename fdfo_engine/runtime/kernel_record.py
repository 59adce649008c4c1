"""Which backends the ops of a run take: kept in its folder and checkpoints, so that a resumed run has the same bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdfo_engine.runtime.durable import replace_file
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.json_text import json_object

KERNELS_NAME = "kernels.json"
Backends = dict[str, str]
"""Backend by name of an op at a shape; an op that is not there takes the first that fits."""


def recorded_kernels(folder: Path | str) -> Backends | None:
    """What the run in `folder` recorded; None where there is no record.

    Raises:
        CheckpointError: the record is damaged.
    """
    file = Path(folder) / KERNELS_NAME
    if not file.is_file():
        return None
    try:
        found = backends_of(json_object(file.read_bytes()))
    except ValueError as error:
        raise CheckpointError(f"{file}: is no record of backends: {error}") from error
    if found is None:
        raise CheckpointError(f"{file}: is no record of backends")
    return found


def backends_of(value: Any) -> Backends | None:
    """`value`, JSON, as backends by op; None where it is something else."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value.values()):
        return None
    return {str(op): str(name) for op, name in value.items()}


def write_kernels(folder: Path | str, backends: Backends) -> None:
    """Keeps `backends` in `folder`, unless that is what it holds.

    Raises:
        CheckpointError: the storage refuses; the record that is there is damaged.
    """
    if recorded_kernels(folder) != backends:
        replace_file(Path(folder) / KERNELS_NAME, json.dumps(backends, indent=1).encode())
