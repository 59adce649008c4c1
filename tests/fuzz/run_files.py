"""A run folder with every file that a run, a server and a label page leave, and how each is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tiny_sd3 import tiny_config

from fdfo_engine.choices.store import STORE_NAME
from fdfo_engine.cli.main import main
from fdfo_engine.config import ConfigError, dump_config
from fdfo_engine.label.link import EngineLink
from fdfo_engine.label.strip import STRIP_NAME, Strip
from fdfo_engine.runtime import events
from fdfo_engine.runtime.base_record import BASE_NAME, BaseFile, BaseRecord, recorded_base
from fdfo_engine.runtime.best_checkpoint import BEST_NAME, Best, note_best, read_best
from fdfo_engine.runtime.errors import CheckpointError, FdfoError
from fdfo_engine.runtime.event_log import EVENTS_NAME, EventLog, truncate_events
from fdfo_engine.runtime.events import EventStream
from fdfo_engine.runtime.kernel_record import KERNELS_NAME, recorded_kernels, write_kernels
from fdfo_engine.runtime.lost_checkpoints import last_saved
from fdfo_engine.runtime.run_folder import (
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    EVALUATIONS_NAME,
    METRICS_NAME,
    PROMPTS_NAME,
    RunFolder,
    checkpoint_store,
    read_log,
    run_config,
)
from fdfo_engine.runtime.run_lock import LOCK_NAME
from fdfo_engine.runtime.run_log import RunLog
from fdfo_engine.runtime.run_pictures import RunPictures, evaluation_images
from fdfo_engine.runtime.run_status import STATUS_NAME
from fdfo_engine.serve.database import Database
from fdfo_engine.trajectory import Rollout

HOUSE = (FdfoError, ConfigError)
"""What a damaged file may end in: a message for the user, with an exit code."""

BASE = BaseRecord("some/model", "a" * 40, {"model_index.json": BaseFile(3, "b" * 64), "vae/x": BaseFile(9, "c" * 64)})
KERNELS = {"adapted_projections 4x8": "torch", "gated_residual 4x8": "cpp"}
CHECKPOINT = "epoch_000002"
EPOCHS = 2


def filled_run(folder: Path) -> Path:
    """The folder of a run of two epochs, none of which was trained, of a model that is not there."""
    (model := folder.with_name("model")).mkdir()
    config = tiny_config(model, folder, log={"tensorboard": False})
    with RunFolder.of(config, BASE) as run:
        run.require_prompts("d" * 64)
        write_kernels(folder, KERNELS)
        log = EventLog(folder)
        stream = EventStream([RunPictures(folder), log, RunLog(folder, tensorboard=False), run.status])
        for epoch in range(1, EPOCHS + 1):
            stream.tell(events.Metrics(epoch=epoch, kind="epoch", values=_metrics(epoch)))
            stream.tell(events.Metrics(epoch=epoch, kind="evaluation", values=_evaluation(epoch)))
            images = torch.rand(2, 3, 8, 8)
            stream.tell(evaluation_images(epoch, ["a circle", "a square"], images, {"brightness": [0.1, 0.2]}))
            tensors = {"weights": {"w": torch.full((2, 2), float(epoch))}, "optimizer": {"m": torch.zeros(2)}}
            state = {"epoch": epoch, "next_pair": 4 * epoch, "world_size": 1, "micro_batch": 5, "notes": {}}
            checkpoint_store(folder).save(f"epoch_{epoch:06d}", tensors, state)
            stream.tell(events.Checkpoint(epoch=epoch, name=f"epoch_{epoch:06d}"))
        log.close()
    assert note_best(folder, Best(CHECKPOINT, 0.4, 0.1))
    _rollout().save(folder / "unscored")
    Database(folder).close()
    (folder / STRIP_NAME).write_text(json.dumps({"0": [{"image": "a" * 32, "prompt": "a circle"}]}))
    (folder / "serve.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": 1}))
    (folder / LOCK_NAME).write_text(json.dumps({"pid": 2**22 - 7, "host": "elsewhere", "started": "2026-01-01"}))
    return folder


def _metrics(epoch: int) -> dict[str, object]:
    return {"epoch": epoch, "pairs": 4, "reward_mean": 0.1 * epoch, "loss": -0.1, "grad_norm": 0.5, "tied_pairs": 0,
            "seconds_rollout": 1.5, "images_per_second": 2.0, "kernel_backend": "torch", "lr": 1e-3}  # fmt: skip


def _evaluation(epoch: int) -> dict[str, object]:
    return {"epoch": epoch, "count": 2, "seed": 1, "weights": "raw", "metrics": {"brightness": 0.4},
            "metrics_stderr": {"brightness": 0.1}, "health": {"sharpness": 0.2}}  # fmt: skip


def _rollout() -> Rollout:
    shape = (2, 2, 3, 1, 2, 2)
    return Rollout(
        images=torch.rand(2, 2, 3, 8, 8), prompts=["a", "b"], pair_ids=[4, 5], velocities=torch.rand(shape),
        direction=torch.rand(2, 1, 2, 2), distance=torch.rand(2), gammas=torch.zeros(2, 4, dtype=torch.float64),
        sigmas=torch.linspace(1, 0, 4), timesteps=torch.linspace(1000, 1, 3), seed=5, weights_version=4, first_pair=4,
        num_pairs=2, block_pairs=2, backend="torch",
    )  # fmt: skip


class Reading(NamedTuple):
    """One way in which a file is read, and what a damaged one may end in."""

    read: Callable[[Path], object]
    may_raise: tuple[type[BaseException], ...] = HOUSE
    same_or_refused: bool = False
    """Whether a value is the one that was written: the file is sealed by a hash."""


def _verb(*words: str) -> Callable[[Path], None]:
    """A command on the run; what it ends in is told by its exit code, where 1 is a bug."""

    def read(folder: Path) -> None:
        assert main([*words, str(folder)]) != 1

    return read


def _checkpoint(folder: Path) -> object:
    """The newest whole checkpoint, as plain values."""
    checkpoint = checkpoint_store(folder).load()
    tensors = {stem: {name: t.tolist() for name, t in group.items()} for stem, group in checkpoint.tensors.items()}
    return checkpoint.name, tensors, checkpoint.state


def _named_checkpoint(folder: Path) -> object:
    return checkpoint_store(folder).load(CHECKPOINT, strict=True).state


def _newest_state(folder: Path) -> object:
    return checkpoint_store(folder).newest_state() or "damaged"


def _opened(folder: Path) -> object:
    """As a run that goes on opens it."""
    (folder / LOCK_NAME).unlink()
    config = run_config(folder)
    with RunFolder.open(folder, dump_config(config), base=BASE) as run:
        run.require_prompts("d" * 64)
        run.truncate_logs(EPOCHS)
    return read_log(folder / METRICS_NAME), read_log(folder / EVALUATIONS_NAME)


def _locked(folder: Path) -> None:
    RunFolder.open(folder, (folder / CONFIG_NAME).read_text(), base=BASE).close()


def _events(folder: Path) -> None:
    last_saved(folder)
    truncate_events(folder, EPOCHS)
    EventLog(folder).close()


def _rollout_of(folder: Path) -> object:
    rollout = Rollout.load(folder / "unscored")
    return {name: value.tolist() if torch.is_tensor(value) else value for name, value in vars(rollout).items()}


def _best(folder: Path) -> object:
    if (best := read_best(folder)) is None:
        raise CheckpointError("not known any more")
    return best


def _strip(folder: Path) -> object:
    return Strip(EngineLink(folder), 2).view()


STATUS, REPORT = Reading(_verb("status")), Reading(_verb("report"))
READINGS: dict[str, list[Reading]] = {
    STATUS_NAME: [STATUS, REPORT, Reading(_verb("status", "--json"))],
    LOCK_NAME: [Reading(_locked)],
    CONFIG_NAME: [Reading(run_config), Reading(_opened), REPORT, STATUS],
    BASE_NAME: [Reading(lambda folder: recorded_base(folder).text, same_or_refused=True), Reading(_opened), STATUS],
    KERNELS_NAME: [Reading(recorded_kernels, same_or_refused=True)],
    PROMPTS_NAME: [Reading(_opened)],
    METRICS_NAME: [REPORT, Reading(_opened)],
    EVALUATIONS_NAME: [REPORT, Reading(_opened)],
    EVENTS_NAME: [Reading(_events), Reading(_opened)],
    ENVIRONMENT_NAME: [REPORT, Reading(_opened)],
    f"checkpoints/{CHECKPOINT}/manifest.json": [
        Reading(_named_checkpoint, same_or_refused=True), Reading(_newest_state), REPORT, STATUS,
    ],
    f"checkpoints/{CHECKPOINT}/state.json": [Reading(_named_checkpoint, same_or_refused=True), Reading(_newest_state)],
    f"checkpoints/{CHECKPOINT}/weights.safetensors": [Reading(_named_checkpoint, same_or_refused=True)],
    BEST_NAME: [Reading(_best, same_or_refused=True), Reading(_opened), STATUS, REPORT],
    "unscored/rollout_00000.json": [Reading(_rollout_of, same_or_refused=True)],
    "unscored/rollout_00000.safetensors": [Reading(_rollout_of, same_or_refused=True)],
    "images/evaluation_epoch_000001.json": [REPORT],
    STRIP_NAME: [Reading(_strip)],
    STORE_NAME: [REPORT, Reading(lambda folder: Database(folder).close())],
}  # fmt: skip
