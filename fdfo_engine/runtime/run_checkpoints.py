"""The checkpoints of the run that one engine trains: never written over those of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fdfo_engine.config import Config, dump_config, resumable_keys
from fdfo_engine.runtime.base_record import BaseRecord
from fdfo_engine.runtime.checkpoint import Checkpoint, CheckpointStore
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.kernel_record import Backends, recorded_kernels, write_kernels
from fdfo_engine.runtime.run_folder import checkpoint_store, record_config


class RunCheckpoints:
    """Of `run.dir`. Nothing here is collective: rank 0 saves, every rank loads.

    Attributes:
        pinned: name of a checkpoint that is kept however many newer ones there are, or None.
        are_ours: whether those that are there were loaded or saved by this engine.
    """

    def __init__(self, config: Config, base: BaseRecord | None, kernels: Backends) -> None:
        self._config, self._base, self._kernels = config, base, kernels
        self.pinned: str | None = None
        self.are_ours = False

    @property
    def folder(self) -> Path:
        """Where they are, each a folder."""
        return self._store().folder

    def require_ours(self) -> None:
        """Raises CheckpointError where a run is there that this engine does not go on with."""
        names = [] if self.are_ours else self._store().names()
        if names:
            raise CheckpointError(
                f"run.dir = {self._config.run.dir}: holds {names[-1]}, which this engine neither loaded nor saved; "
                "take Engine.resume, or another folder"
            )

    def save(self, name: str, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Commits a checkpoint, with the settings and the records of base model and backends in the run folder.

        Raises:
            UsageError: the folder holds a run with other settings.
            CheckpointError: as `require_ours`; it holds a run on another base model; no room; the storage refuses.
                Earlier checkpoints are untouched.
        """
        self.require_ours()
        folder, settings = Path(self._config.run.dir), dump_config(self._config)
        may_change = resumable_keys(self._config)
        record_config(folder, settings, base=self._base, has_moved=self.are_ours, may_change=may_change)
        self.record_kernels()
        base = None if self._base is None else self._base.as_json()
        self._store().save(name, tensors, state | {"settings": settings, "base": base, "kernels": self._kernels})

    def record_kernels(self) -> None:
        """Writes down what the ops of this run take, in its folder.

        Raises:
            CheckpointError: the storage refuses.
        """
        write_kernels(self._config.run.dir, self._kernels)

    def load(self, name: str | None, *, strict: bool) -> Checkpoint | None:
        """As `CheckpointStore.load`."""
        return self._store().load(name, strict=strict)

    def _store(self) -> CheckpointStore:
        return checkpoint_store(self._config.run.dir, self._config.checkpoint.keep, self.pinned)


def kernels_of_run(folder: Path | str) -> Backends | None:
    """What the run in `folder` recorded of its backends; none at all where its checkpoints are older than records.

    None where no run has begun.

    Raises:
        CheckpointError: the record is damaged.
    """
    recorded = recorded_kernels(folder)
    return {} if recorded is None and checkpoint_store(folder).names() else recorded
