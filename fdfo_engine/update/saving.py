"""Checkpoints of an engine: the values are copied, then written beside the training, one checkpoint at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fdfo_engine.runtime import events
from fdfo_engine.runtime.checkpoint import checkpoint_name
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.distributed import any_rank, is_main, on_main
from fdfo_engine.runtime.errors import FdfoError
from fdfo_engine.runtime.progress import Progress
from fdfo_engine.runtime.run_checkpoints import RunCheckpoints
from fdfo_engine.update.zero import ZeroTrainer

_PATIENCE_S = 1.0


class Saving:
    """What one engine saves. Collective, but for `carry_to_its_end`; rank 0 alone holds copies, and writes."""

    def __init__(self, trainer: ZeroTrainer, progress: Progress) -> None:
        """`progress` is told of each checkpoint once it is committed."""
        self._trainer, self._progress = trainer, progress
        self._checkpoints: RunCheckpoints | None = None

    def begin(
        self, checkpoints: RunCheckpoints, average: Mapping[str, Tensor] | None, state: dict[str, Any]
    ) -> Path:  # fmt: skip
        """Copies weights, moments and `average`, and begins to write them with `state` among `checkpoints`.

        Returns where it will be; its name follows from the state's epoch.

        The one before is finished first: there are never two copies.

        Raises:
            UsageError, CheckpointError: as `RunCheckpoints.begin`; or the one before could not be written.
        """
        self.finish(wait=True)
        tensors = {"weights": self._trainer.weights(only_main=True), "optimizer": self._trainer.state(only_main=True)}
        if average is not None and is_main():
            tensors["ema"] = {name: tensor.clone() for name, tensor in average.items()}
        name = checkpoint_name(state["epoch"])
        on_main(lambda: checkpoints.begin(name, tensors, state))
        checkpoints.are_ours = True
        self._checkpoints = checkpoints
        return checkpoints.folder / name

    def finish(self, *, wait: bool) -> None:
        """Tells of what was begun, if it is written; with `wait` once it is.

        Raises:
            CheckpointError: it could not be written.
        """
        while any_rank(wait and self._is_writing()):
            pass  # no rank waits long in one collective
        on_main(self._tell_written)

    def carry_to_its_end(self) -> None:
        """Not collective: whatever ends the run or the engine, what was begun is written."""
        while self._is_writing():
            pass
        try:
            self._tell_written()
        except FdfoError as error:
            warn(f"the last checkpoint was not written: {error}")

    def _is_writing(self) -> bool:
        return self._checkpoints is not None and self._checkpoints.is_writing(_PATIENCE_S)

    def _tell_written(self) -> None:
        written = None if self._checkpoints is None else self._checkpoints.take_written()
        if written is not None:
            name, state = written
            self._progress.stream.tell(events.Checkpoint(epoch=state["epoch"], name=name))
