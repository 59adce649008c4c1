"""The checkpoints of the run that one engine trains: never written over those of another."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torch import Tensor

from fdfo_engine.config import Config, dump_config, resumable_keys
from fdfo_engine.runtime import pulse
from fdfo_engine.runtime.base_record import BaseRecord
from fdfo_engine.runtime.best_checkpoint import forget_best, read_best
from fdfo_engine.runtime.checkpoint import Checkpoint, CheckpointStore
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.kernel_record import Backends, recorded_kernels, write_kernels
from fdfo_engine.runtime.run_folder import checkpoint_store, record_config


class RunCheckpoints:
    """Of `run.dir`. Nothing here is collective: rank 0 saves, every rank loads.

    One checkpoint at a time is written by a thread: `begin`, then `is_writing` until it is false, then `take_written`.

    Attributes:
        pinned: name of a checkpoint that is kept however many newer ones there are, or None.
        are_ours: whether those that are there were loaded or saved by this engine.
    """

    def __init__(self, config: Config, base: BaseRecord | None, kernels: Backends) -> None:
        self._config, self._base, self._kernels = config, base, kernels
        self.pinned: str | None = None
        self.are_ours = False
        self._writing: _Writing | None = None

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

    def begin(self, name: str, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Begins to write a checkpoint, with the settings and the records of base model and backends beside it.

        `tensors` must not change any more, and nothing else may be being written.

        Raises:
            UsageError: the folder holds a run with other settings.
            CheckpointError: as `require_ours`; it holds a run on another base model; the storage refuses the records.
        """
        assert self._writing is None, "take_written comes first"
        self.require_ours()
        folder, settings = Path(self._config.run.dir), dump_config(self._config)
        may_change = resumable_keys(self._config)
        record_config(folder, settings, base=self._base, has_moved=self.are_ours, may_change=may_change)
        self.record_kernels()
        base = None if self._base is None else self._base.as_json()
        state = copy.deepcopy(state) | {"settings": settings, "base": base, "kernels": self._kernels}
        forget_best(folder, after=name)
        self._writing = _Writing(self._store(), name, tensors, state)

    def is_writing(self, patience_s: float) -> bool:
        """Whether a checkpoint is still being written; waits for its end for `patience_s`."""
        return self._writing is not None and not self._writing.has_ended(patience_s)

    def take_written(self) -> tuple[str, dict[str, Any]] | None:
        """Name and state of the checkpoint that was written since this was last asked; it is committed.

        Raises:
            CheckpointError: it could not be written: no room, or the storage refuses. Earlier ones are untouched.
        """
        writing = self._writing
        if writing is None or self.is_writing(0.0):
            return None
        self._writing = None
        writing.raise_error()
        return writing.name, writing.state

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
        best = read_best(self._config.run.dir)
        kept = {name for name in (self.pinned, best and best.name) if name}
        return checkpoint_store(self._config.run.dir, self._config.checkpoint.keep, kept)


class _Writing:
    """A checkpoint on its way to the disk, in a thread of its own."""

    def __init__(
        self, store: CheckpointStore, name: str, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
    ) -> None:
        self.name, self.state = name, state
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._future = self._pool.submit(_watched_save, store, name, tensors, state)
        self._pool.shutdown(wait=False)

    def has_ended(self, patience_s: float) -> bool:
        """Whether it is written, or could not be."""
        return not wait([self._future], timeout=patience_s).not_done

    def raise_error(self) -> None:
        """Raises what ended the writing, if anything did."""
        self._future.result()


def _watched_save(
    store: CheckpointStore, name: str, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> None:
    with pulse.work("the checkpoint's writer"):
        store.save(name, tensors, state)


def kernels_of_run(folder: Path | str) -> Backends | None:
    """What the run in `folder` recorded of its backends; none at all where its checkpoints are older than records.

    None where no run has begun.

    Raises:
        CheckpointError: the record is damaged.
    """
    recorded = recorded_kernels(folder)
    return {} if recorded is None and checkpoint_store(folder).names() else recorded
