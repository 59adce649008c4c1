"""Trained weights on their way out, of an engine or of a run's checkpoint alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fdfo_engine.config import Config, dump_config
from fdfo_engine.models.advice import without_advice
from fdfo_engine.models.base_model import Base
from fdfo_engine.models.export_styles import ExportStyle, refuse_style
from fdfo_engine.models.flow_model import FlowModel
from fdfo_engine.models.registry import agreed_base, load_model, locate_base
from fdfo_engine.report.model_card import CARD_NAME, model_card
from fdfo_engine.runtime.base_record import BaseRecord, recorded_base, write_base
from fdfo_engine.runtime.checkpoint import Checkpoint
from fdfo_engine.runtime.distributed import on_main
from fdfo_engine.runtime.durable import refuse_filled, replace_file
from fdfo_engine.runtime.errors import CheckpointError, UsageError
from fdfo_engine.runtime.run_folder import (
    BASE_LOCATION,
    checkpoint_store,
    differing_settings,
    require_recorded,
    run_config,
)
from fdfo_engine.runtime.split_weights import whole_shape

Weights = Literal["auto", "ema", "raw"]
WHAT_WEIGHTS_BELONG_TO = ("model.family", "model.train", "model.quantize", "lora")


def export_run(
    run_dir: str | Path, folder: str | Path, *, checkpoint: str | None = None, weights: Weights = "auto",
    style: ExportStyle = "diffusers", overwrite: bool = False, base: str | Path | None = None,
) -> int:  # fmt: skip
    """As `Engine.export` of the run in `run_dir`, without an engine: no DeepSpeed, optimizer or ranks.

    It holds the model twice, once as trained and once as loaded back.

    Args:
        run_dir: a run folder.
        folder: where to write.
        checkpoint: name of the one to export; None takes the newest whole one.
        weights, style, overwrite: as in `Engine.export`, which this raises the errors of.
        base: where its base model lies now, if not at `model.id`.

    Returns:
        The epoch that was exported.

    Raises:
        UsageError: several ranks were started.
        CheckpointError: no run there, no whole checkpoint, or one of another model or base.
        ConfigError: its `config.yaml` was edited into something that is not valid.
    """
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(f"export: {ranks} ranks would write one folder; start it without a launcher")
    refuse_filled(Path(folder), overwrite)
    config = run_config(run_dir, base)
    refuse_style(style, config.model)
    store = checkpoint_store(run_dir)
    found = store.load(checkpoint)
    if found is None:
        raise CheckpointError(f"{run_dir}: no checkpoint in {store.folder}")
    averages = takes_average(weights, keeps=config.update.ema is not None)
    found.tensors.pop("optimizer", None)  # twice the size of the weights
    gpu = torch.cuda.is_available()
    located = locate_base(config)
    require_recorded(run_dir, located.record)
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    model = load_model(config, device, located)
    refuse_foreign(found, config, model, located.record)
    epoch, exported = int(found.state["epoch"]), found.tensors["ema" if averages else "weights"]
    write_export(model, config, located.record, epoch, Path(folder), exported, style)
    return epoch


def base_of_run(config: Config) -> Base:
    """The base model on every rank, held against what the run in `run.dir`, if any, recorded; collective.

    Raises:
        UsageError, EnvironmentProblem: as `agreed_base`.
        CheckpointError: the run began with another one; names the files that differ.
    """
    base = agreed_base(config)
    on_main(lambda: require_recorded(config.run.dir, base.record))
    return base


def write_export(
    model: FlowModel, config: Config, base: BaseRecord | None, epoch: int, folder: Path, weights: dict[str, Tensor],
    style: ExportStyle,
) -> None:  # fmt: skip
    """The export of `weights`, which `model` takes, its model card, and the record of the base that they belong to."""
    base = recorded_base(config.run.dir) or base  # the name that it had when the run began
    with without_advice():
        model.export(folder, weights, style)
    card = model_card(config, epoch, whole=style == "merged", base=base, folder=folder)
    if base is not None:
        write_base(folder, base)
    replace_file(folder / CARD_NAME, card.encode())


def takes_average(weights: Weights, *, keeps: bool) -> bool:
    """Whether `weights` means the average of a run that `keeps` one or not."""
    if weights == "ema" and not keeps:
        raise UsageError("weights = 'ema': the run keeps no average; set update.ema")
    return weights != "raw" and keeps


def refuse_foreign(checkpoint: Checkpoint, config: Config, model: FlowModel, base: BaseRecord | None) -> None:
    """Holds a checkpoint against the settings, the base and the weights that are to take it.

    Where the base lies counts only for models that have no record.

    Raises:
        CheckpointError: it is of another model, and how; it keeps no average where the settings want one.
    """
    kept = checkpoint.state.get("base")
    if base is not None and kept is not None:
        BaseRecord.from_json(kept, checkpoint.folder).require_same(base, checkpoint.folder)
    compared = WHAT_WEIGHTS_BELONG_TO if base is not None else (*BASE_LOCATION, *WHAT_WEIGHTS_BELONG_TO)
    settings = differing_settings(checkpoint.state["settings"], dump_config(config), compared)
    if settings:
        lines = [f"  {key}: {change}" for key, change in settings.items()]
        raise CheckpointError("\n".join([f"{checkpoint.folder}: of another model", *lines]))
    _refuse_other_shapes(checkpoint, model)
    if config.update.ema is not None and "ema" not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.folder}: keeps no average of the weights, but update.ema is set")


def _refuse_other_shapes(checkpoint: Checkpoint, model: FlowModel) -> None:
    own = {name: whole_shape(p) for name, p in model.trained_parameters()}
    theirs = {name: tuple(w.shape) for name, w in checkpoint.tensors.get("weights", {}).items()}
    differing = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if differing:
        lines = [f"  {n}: {theirs.get(n, 'absent')} there, {own.get(n, 'absent')} here" for n in differing[:5]]
        head = f"{checkpoint.folder}: of another model: {len(differing)} weights differ"
        raise CheckpointError("\n".join([head, *lines]))
