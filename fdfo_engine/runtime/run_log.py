"""What a run tells while it runs: metrics.jsonl, TensorBoard, wandb, pictures, and one line an epoch."""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.distributed import is_main
from fdfo_engine.runtime.durable import append_line, plain_json, replace_file
from fdfo_engine.runtime.errors import EnvironmentProblem
from fdfo_engine.runtime.picture import draw_grid, save_png, to_picture
from fdfo_engine.runtime.run_folder import EVALUATIONS_NAME, METRICS_NAME

IMAGES_NAME = "images"
MAX_EVALUATION_IMAGES = 24
_SMOOTHING_EPOCHS = 5


class SilentLog:
    """A log that keeps nothing, for every rank but 0; and the interface of `RunLog`."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Logs the metrics of one finished epoch; `record["epoch"]` counts finished epochs, so the first is 1."""

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Logs one evaluation: `epoch`, `count`, `seed`, `weights`, `metrics`, `metrics_stderr`, `health`, ..."""

    def images(self, name: str, images: Tensor, captions: Sequence[str], columns: int = 2) -> None:
        """Draws a captioned grid to `images/<name>.png`: `[N, 3, H, W]` in 0..1; 2 columns put a pair side by side."""

    def evaluation_images(
        self, epoch: int, prompts: Sequence[str], images: Tensor, scores: Mapping[str, Sequence[float]]
    ) -> None:
        """Keeps the first 24 images of an evaluation, one file each, with prompts and scores by metric."""

    def close(self) -> None:
        """Writes out what is buffered."""


class RunLog(SilentLog):
    """The log of rank 0. A record is on disk when `epoch` or `evaluation` returns."""

    def __init__(
        self,
        folder: Path,
        *,
        epochs: int,
        first_epoch: int = 0,
        tensorboard: bool = True,
        wandb: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the log.

        Args:
            folder: the run folder, its logs already truncated to `first_epoch` (`RunFolder.truncate_logs`).
            epochs: of the whole run, for the progress line.
            first_epoch: epochs finished before; TensorBoard hides what an earlier process logged after it.
            tensorboard: writes `tensorboard/`.
            wandb: logs to Weights & Biases, as the environment configures it.
            settings: the resolved settings, for wandb.

        Raises:
            EnvironmentProblem: a wanted tracker is not installed.
        """
        self._folder = folder
        self._progress = _Progress(epochs)
        self._board = _open_tensorboard(folder / "tensorboard", first_epoch) if tensorboard else None
        self._wandb = _open_wandb(folder, settings or {}) if wandb else None

    def epoch(self, record: Mapping[str, Any]) -> None:
        """As `SilentLog.epoch`.

        Raises:
            CheckpointError: the storage refuses.
        """
        append_line(self._folder / METRICS_NAME, record)
        self._track(record, int(record["epoch"]), "train")
        say(self._progress.line(record))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """As `SilentLog.evaluation`.

        Raises:
            CheckpointError: the storage refuses.
        """
        append_line(self._folder / EVALUATIONS_NAME, record)
        metrics, errors = record["metrics"], record.get("metrics_stderr") or {}
        self._track(metrics, int(record["epoch"]), "evaluation")
        self._track(record.get("health") or {}, int(record["epoch"]), "health")
        shown = "  ".join(f"{name} {mean:.4f}{_plus_minus(errors.get(name))}" for name, mean in metrics.items())
        say(f"evaluation after epoch {record['epoch']} ({record['count']} images, {record['weights']}): {shown}")

    def images(self, name: str, images: Tensor, captions: Sequence[str], columns: int = 2) -> None:
        """As `SilentLog.images`."""
        save_png(draw_grid(images, captions, columns), self._folder / IMAGES_NAME / f"{name}.png")

    def evaluation_images(
        self, epoch: int, prompts: Sequence[str], images: Tensor, scores: Mapping[str, Sequence[float]]
    ) -> None:
        """As `SilentLog.evaluation_images`: `images/evaluation_epoch_XXXXXX/NNN.png`, and a `.json` beside it."""
        stem, items = f"evaluation_epoch_{epoch:06d}", []
        for n, image in enumerate(images[:MAX_EVALUATION_IMAGES]):
            file = f"{stem}/{n:03d}.png"
            save_png(to_picture(image), self._folder / IMAGES_NAME / file)
            own = {name: float(values[n]) for name, values in scores.items()}
            items.append({"file": file, "prompt": prompts[n], "scores": own})
        text = json.dumps(plain_json({"epoch": epoch, "items": items}), indent=1)
        replace_file(self._folder / IMAGES_NAME / f"{stem}.json", text.encode())

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


def open_run_log(folder: Path, **options: Any) -> SilentLog:
    """`RunLog(folder, **options)` on rank 0, and a `SilentLog` elsewhere."""
    return RunLog(folder, **options) if is_main() else SilentLog()


class _Progress:
    """Makes one aligned line of an epoch's metrics."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._recent: deque[float] = deque(maxlen=_SMOOTHING_EPOCHS)
        self._last_reward: float | None = None

    def line(self, record: Mapping[str, Any]) -> str:
        epoch, width = int(record["epoch"]), len(str(self._epochs))
        seconds = [(name, float(record.get(f"seconds_{name}") or 0)) for name in ("rollout", "reward", "update")]
        parts = [
            f"epoch {epoch:>{width}}/{self._epochs}",
            self._reward(record),
            f"{_number(record, 'images_per_second'):7.2f} img/s",
            " ".join(f"{name} {value:.1f}s" for name, value in seconds),
            f"skipped {record.get('skipped_steps', 0)} tied {record.get('tied_pairs', 0)}",
            self._time_left(record, epoch),
        ]
        return "  ".join(parts)

    def _reward(self, record: Mapping[str, Any]) -> str:
        mean = _number(record, "reward_mean")
        delta = mean - self._last_reward if self._last_reward is not None else 0.0
        self._last_reward = mean
        return f"reward {mean:8.4f} ±{_number(record, 'reward_std'):.4f} ({delta:+.4f})"

    def _time_left(self, record: Mapping[str, Any], epoch: int) -> str:
        self._recent.append(_number(record, "seconds_total"))
        return f"left {duration(sum(self._recent) / len(self._recent) * max(0, self._epochs - epoch))}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: `48s`, `12m 05s`, `3h 20m`, `2d 4h`; `?` for a number that is not finite."""
    if not 0 <= seconds < float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return float("nan") if value is None else float(value)


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ±{error:.4f}"


def _open_tensorboard(folder: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        hint = "pip install tensorboard, or set log.tensorboard: false"
        raise EnvironmentProblem(f"log.tensorboard: tensorboard is not installed; {hint}") from error
    return SummaryWriter(str(folder), purge_step=first_epoch + 1 if first_epoch else None)


def _open_wandb(folder: Path, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        hint = 'pip install "fdfo-engine[wandb]", or set log.wandb: false'
        raise EnvironmentProblem(f"log.wandb: wandb is not installed; {hint}") from error
    identity = folder / "wandb_id"  # so that a resumed run continues its own curves
    if not identity.is_file():
        replace_file(identity, uuid.uuid4().hex.encode())
    name = folder.resolve().name
    return wandb.init(dir=str(folder), id=identity.read_text(), name=name, resume="allow", config=dict(settings))
