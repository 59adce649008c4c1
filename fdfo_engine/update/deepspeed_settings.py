"""DeepSpeed's settings, and its import without what it does to a process unasked."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

from fdfo_engine.config import OptimizerConfig, ZeroConfig

BUCKET_VALUES = 500_000_000
"""Gradients that DeepSpeed exchanges at once."""

MAX_LIVE_VALUES = 1_000_000_000
"""Weights that stage 3 gathers at once, DeepSpeed's own default."""


def deepspeed_config(optimizer: OptimizerConfig, zero: ZeroConfig, values: int) -> dict[str, Any]:
    """DeepSpeed's own settings for `values` trained values; `zero.deepspeed` adds to them (its keys are checked)."""
    extra = dict(zero.deepspeed)
    placed: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}} if zero.offload_optimizer else {}
    placed |= {"offload_param": {"device": "cpu"}} if zero.offload_parameters else {}
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: micro-batches are dealt by the update
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "steps_per_print": 1 << 30,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU before each forward, to time what we time
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own for the CPU is compiled for minutes at the first start
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": min(BUCKET_VALUES, values),  # allocated as it stands: 2 GB by default
        }
        | placed
        | extra.pop("zero_optimization", {}),
    }
    if zero.stage < 3:
        generated["gradient_allreduce_op"] = "sum"
    return generated | extra


def import_deepspeed() -> Any:
    """DeepSpeed, told that its shared-memory CPU collective is not there: it would be compiled (90 s) at each start."""
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    compatible = getattr(importlib.import_module("deepspeed.ops"), "__compatible_ops__", None)
    if isinstance(compatible, dict) and not torch.cuda.is_available():
        compatible["deepspeed_shm_comm"] = False
    _forget_closed_group()
    return deepspeed


def _forget_closed_group() -> None:
    """DeepSpeed keeps its copy of the world; where that was closed since, a second engine would go on using it."""
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    if (world := getattr(groups, "_WORLD_GROUP", None)) is None:
        return
    try:
        torch.distributed.get_process_group_ranks(world)
    except (KeyError, ValueError):
        groups._WORLD_GROUP = None
