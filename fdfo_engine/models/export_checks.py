"""What an export holds against what was trained, number by number: a lost adapter moves a velocity by very little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.runtime.errors import CheckpointError

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest relative difference (norm) of a tensor that was written in, or loaded into, a dtype."""


def require_adapter(network: Any, folded: dict[str, Tensor], folder: Path) -> None:
    """Holds a loaded LoRA, with the scale of its loader, against `folded` (diffusers' names, alpha folded in).

    Raises:
        CheckpointError: a layer has no adapter, or another one.
    """
    for name, wanted in folded.items():
        path, part, _ = name.rsplit(".", 2)
        layer = network.get_submodule(path)
        adapters = getattr(layer, part, {})
        if len(adapters) != 1:
            raise CheckpointError(f"export to {folder}: loaded back, {path} has {len(adapters)} adapters")
        ((adapter, factor),) = adapters.items()
        scale = layer.scaling[adapter] if part == "lora_B" else 1.0
        _require_near(scale * factor.weight, wanted, name, folder)


def require_weights(network: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Holds loaded weights against trained ones of the same names.

    Raises:
        CheckpointError: one differs by more than its dtype rounds.
    """
    found = dict(network.named_parameters())
    for name, wanted in weights.items():
        _require_near(found[name], wanted, name, folder)


def _require_near(found: Tensor, wanted: Tensor, name: str, folder: Path) -> None:
    limit, wanted = ROUNDING[found.dtype], wanted.to(found.device)
    error = float((found.detach().float() - wanted).norm())
    if not error <= limit * float(wanted.norm()):
        raise CheckpointError(f"export to {folder}: loaded back, {name} is off by {error:.1e} (norm)")
