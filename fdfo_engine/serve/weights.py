"""The states of the weights that images can be drawn with, by the names of `/v1/models`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fdfo_engine.engine import Engine
from fdfo_engine.exporting import Weights
from fdfo_engine.models.registry import load_model
from fdfo_engine.runtime.run_folder import checkpoint_store
from fdfo_engine.serve.problems import Problem

BASE, RUN = "base", "run"
_CHECKPOINT = re.compile(r"run@(epoch_\d{6,12})")


def model_names(run_dir: str) -> list[str]:
    """`base`, `run`, and `run@NAME` of each checkpoint."""
    return [BASE, RUN, *(f"{RUN}@{name}" for name in checkpoint_store(run_dir).names())]


def require_model(name: str, run_dir: str) -> None:
    """Refuses a name that is none of `model_names`.

    Raises:
        Problem: with the names there are.
    """
    names = model_names(run_dir)
    if name not in names:
        raise Problem(404, "model_not_found", f"model {name!r}: takes {', '.join(names)}")


def weights_named(engine: Engine, name: str) -> Weights | Mapping[str, Tensor]:
    """What `Engine.generate` takes as `weights` for the model `name`.

    Raises:
        Problem: no such model, or its checkpoint is gone.
    """
    if name == RUN:
        return "auto"
    if name == BASE:
        return _base(engine)
    found = _CHECKPOINT.fullmatch(name)
    checkpoint = checkpoint_store(engine.config.run.dir).load(found[1]) if found else None
    if checkpoint is None:
        raise Problem(404, "model_not_found", f"model {name!r}: its checkpoint is gone")
    return checkpoint.tensors["ema" if "ema" in checkpoint.tensors else "weights"]


def _base(engine: Engine) -> dict[str, Tensor]:
    """Untrained: an adapter of zeros; after full training the weights as they are loaded."""
    if engine.config.model.train == "lora":
        return {name: torch.zeros_like(weight) for name, weight in engine.trainer.weights().items()}
    fresh = load_model(engine.config, torch.device("cpu"), engine.base)
    return {name: parameter.detach().float() for name, parameter in fresh.trained_parameters()}
