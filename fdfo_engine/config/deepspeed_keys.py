"""Which keys `zero.deepspeed` may add. DeepSpeed itself keeps unknown keys in silence, so they are checked here."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

WHOLE, FLAG, TEXT, LIST, NUMBER = "a whole number", "true or false", "text", "a list", "a number"

ALLOWED: Mapping[str, Any] = {
    "zero_optimization": {
        "contiguous_gradients": FLAG,
        "overlap_comm": FLAG,
        "reduce_bucket_size": WHOLE,
        "allgather_bucket_size": WHOLE,
        "sub_group_size": WHOLE,
        "memory_efficient_linear": FLAG,
        "log_trace_cache_warnings": FLAG,
        "stage3_prefetch_bucket_size": WHOLE,
        "stage3_param_persistence_threshold": WHOLE,
        "stage3_model_persistence_threshold": WHOLE,
        "stage3_max_live_parameters": WHOLE,
        "stage3_max_reuse_distance": WHOLE,
        "stage3_module_granularity_threshold": WHOLE,
        "stage3_use_all_reduce_for_fetch_params": FLAG,
        "stage3_allgather_sequential": FLAG,
    },
    "comms_logger": {"enabled": FLAG, "verbose": FLAG, "prof_all": FLAG, "prof_ops": LIST, "debug": FLAG},
    "flops_profiler": {
        "enabled": FLAG,
        "profile_step": WHOLE,
        "module_depth": WHOLE,
        "top_modules": WHOLE,
        "detailed": FLAG,
        "output_file": TEXT,
        "recompute_fwd_factor": NUMBER,
    },
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "steps_per_print": WHOLE,
    "disable_python_gc": FLAG,
}
"""Every further key a run may give, and what it takes: speed, memory and profiling, nothing that changes results."""

RESERVED: Mapping[str, str] = {
    "train_batch_size": "the key is sampling.pairs_per_epoch",
    "train_micro_batch_size_per_gpu": "the key is update.micro_batch",
    "gradient_accumulation_steps": "the keys are update.micro_batch and update.optimizer_steps",
    "gradient_clipping": "the key is optimizer.max_grad_norm",
    "optimizer": "the section is optimizer",
    "scheduler": "the learning rate is constant; the key is optimizer.lr",
    "bf16": "the key is model.dtype",
    "bfloat16": "the key is model.dtype",
    "fp16": "the key is model.dtype",
    "amp": "the key is model.dtype",
    "torch_autocast": "the key is model.dtype",
    "data_types": "the key is model.dtype",
    "communication_data_type": "gradients travel in float32",
    "gradient_allreduce_op": "gradients are summed",
    "prescale_gradients": "gradients are summed",
    "gradient_predivide_factor": "gradients are summed",
    "zero_allow_untested_optimizer": "the section is optimizer",
    "zero_force_ds_cpu_optimizer": "the key is zero.offload_optimizer",
    "tensorboard": "the key is log.tensorboard",
    "wandb": "the key is log.wandb",
    "checkpoint": "the section is checkpoint",
    "zero_optimization.stage": "the key is zero.stage",
    "zero_optimization.offload_optimizer": "the key is zero.offload_optimizer",
    "zero_optimization.offload_param": "the key is zero.offload_parameters",
    "zero_optimization.cpu_offload": "the key is zero.offload_optimizer",
    "zero_optimization.cpu_offload_param": "the key is zero.offload_parameters",
}
"""Keys that the engine generates, or that would undo what it generates, and where the setting really is."""


def deepspeed_problems(
    tree: Mapping[str, Any], allowed: Mapping[str, Any] = ALLOWED, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """`(key below zero.deepspeed, sentence)` for every one that is reserved, unknown or of a wrong type."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        kind = allowed.get(key)
        if name in RESERVED:
            yield name, f"set by fdfo; remove it ({RESERVED[name]})"
        elif kind is None:
            yield name, f"unknown key{_nearest(key, allowed, prefix)}"
        elif not isinstance(kind, str):
            if isinstance(value, Mapping):
                yield from deepspeed_problems(value, kind, f"{name}.")
            else:
                yield name, f"takes a mapping of {', '.join(kind)}"
        elif not _is(kind, value):
            yield name, f"takes {kind}"


def _nearest(key: str, allowed: Mapping[str, Any], prefix: str) -> str:
    reserved = [name.removeprefix(prefix) for name in RESERVED if name.startswith(prefix)]
    near = difflib.get_close_matches(key, [*allowed, *(n for n in reserved if "." not in n)], n=1)
    if not near:
        return f"; takes {', '.join(allowed)}"
    own = RESERVED.get(prefix + near[0])
    return f"; did you mean {near[0]}?" + (f" That one is set by fdfo; remove it ({own})" if own else "")


def _is(kind: str, value: object) -> bool:
    """Whether `value` is of the kind; `5e8`, as DeepSpeed's own pages write it, is a whole number."""
    if isinstance(value, bool):
        return kind == FLAG
    if kind == WHOLE:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    types: dict[str, type[Any] | tuple[type[Any], ...]] = {TEXT: str, LIST: (list, tuple), NUMBER: (int, float)}
    return kind in types and isinstance(value, types[kind])
