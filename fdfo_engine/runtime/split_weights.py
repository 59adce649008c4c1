"""What ZeRO stage 3 leaves on weights that it splits over ranks, and on their modules; told without DeepSpeed itself.

DeepSpeed marks a split weight by attributes of its own. Only `update/zero.py` uses DeepSpeed; others ask here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def whole_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of all of `weight`, of which this rank may hold a piece."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def num_values(weight: Tensor) -> int:
    """How many values all of `weight` has."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def own_piece(weight: Tensor) -> Tensor:
    """What this rank holds of `weight`: all, where it is not split."""
    piece: Tensor = getattr(weight, "ds_tensor", weight)
    return piece.detach()


def brings_weights(hook: Any) -> bool:
    """Whether a module's `hook` is DeepSpeed's: it brings the module's weights and leaves what that computes alone."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "deepspeed"
