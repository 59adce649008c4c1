"""Which backends the ops of a run take: kept in its folder and checkpoints, so that a resumed run has the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdfo_engine.runtime.durable import replace_file, sealed_json, unsealed_json
from fdfo_engine.runtime.errors import CheckpointError

KERNELS_NAME = "kernels.json"
_SEAL = "sha256"
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
        return Backends(unsealed_json(file, _SEAL))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"which backends the run goes by: {error}") from error


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
        replace_file(Path(folder) / KERNELS_NAME, sealed_json(backends, _SEAL))
