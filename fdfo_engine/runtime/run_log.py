"""The numbers of a run: metrics.jsonl, evaluations.jsonl, TensorBoard, wandb."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdfo_engine.runtime import events
from fdfo_engine.runtime.durable import append_line, replace_file
from fdfo_engine.runtime.errors import EnvironmentProblem
from fdfo_engine.runtime.run_folder import EVALUATIONS_NAME, METRICS_NAME


class RunLog:
    """Keeps the metrics of epochs and evaluations; a listener of a run's events, on rank 0."""

    def __init__(
        self,
        folder: Path,
        *,
        first_epoch: int = 0,
        tensorboard: bool = True,
        wandb: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the log.

        Args:
            folder: the run folder, its logs already truncated to `first_epoch` (`RunFolder.truncate_logs`).
            first_epoch: epochs finished before; TensorBoard hides what an earlier process logged after it.
            tensorboard: writes `tensorboard/`.
            wandb: logs to Weights & Biases, as the environment configures it.
            settings: the resolved settings, for wandb.

        Raises:
            EnvironmentProblem: a wanted tracker is not installed.
        """
        self._folder = folder
        self._board = _open_tensorboard(folder / "tensorboard", first_epoch) if tensorboard else None
        self._wandb = _open_wandb(folder, settings or {}) if wandb else None

    def __call__(self, event: events.Event) -> None:
        """Keeps the numbers of an epoch or an evaluation: their line is on disk when it returns.

        Raises:
            CheckpointError: the storage refuses.
        """
        match event.data:
            case events.Metrics(kind="epoch", values=record):
                append_line(self._folder / METRICS_NAME, record)
                self._track(record, int(record["epoch"]), "train")
            case events.Metrics(kind="evaluation", values=record):
                append_line(self._folder / EVALUATIONS_NAME, record)
                self._track(record["metrics"], int(record["epoch"]), "evaluation")
                self._track(record.get("health") or {}, int(record["epoch"]), "health")

    def close(self) -> None:
        """Writes out and closes the trackers."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _track(self, values: Mapping[str, Any], step: int, group: str) -> None:
        numbers = {f"{group}/{k}": float(v) for k, v in values.items() if isinstance(v, int | float) and k != "epoch"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(numbers | {"epoch": step})


def tracker_library() -> Any:
    """The package that `log.wandb` needs.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        hint = 'pip install "fdfo-engine[wandb]", or set log.wandb: false'
        raise EnvironmentProblem(f"log.wandb: wandb is not installed; {hint}") from error
    return wandb


def _open_tensorboard(folder: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        hint = "pip install tensorboard, or set log.tensorboard: false"
        raise EnvironmentProblem(f"log.tensorboard: tensorboard is not installed; {hint}") from error
    return SummaryWriter(str(folder), purge_step=first_epoch + 1 if first_epoch else None)


def _open_wandb(folder: Path, settings: Mapping[str, Any]) -> Any:
    wandb = tracker_library()
    identity = folder / "wandb_id"  # so that a resumed run continues its own curves
    if not identity.is_file():
        replace_file(identity, uuid.uuid4().hex.encode())
    name = folder.resolve().name
    return wandb.init(dir=str(folder), id=identity.read_text(), name=name, resume="allow", config=dict(settings))
