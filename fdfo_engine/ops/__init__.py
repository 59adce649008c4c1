"""Public ops: the only surface other frontends import kernels through."""

import sys

from fdfo_engine.ops._dispatch import BackendUnavailableError, backend_for, backends
from fdfo_engine.ops.fdfo_loss import fdfo_loss
from fdfo_engine.ops.feed_forward import feed_forward
from fdfo_engine.ops.guided_velocity import guided_velocity
from fdfo_engine.ops.lora_linear import lora_linear, lora_linear_group
from fdfo_engine.ops.pair_direction import pair_direction
from fdfo_engine.ops.paired_noise import paired_noise
from fdfo_engine.ops.paired_step import paired_step
from fdfo_engine.ops.philox import (
    DEAL_STREAM,
    GENERATION_STREAM,
    PROMPT_ORDER_STREAM,
    SCALAR_STREAM,
    SHARED_STREAM,
    churn_stream,
    deal_stream,
    philox_words,
)
from fdfo_engine.ops.philox_normal import pair_scalar_normal, philox_normal
from fdfo_engine.ops.replay import replay

_OPS = (
    philox_normal,
    paired_noise,
    paired_step,
    guided_velocity,
    replay,
    pair_direction,
    fdfo_loss,
    lora_linear,
    feed_forward,
)


def implementations() -> dict[str, tuple[str, ...]]:
    """The backends that each op is implemented in, by the op's name."""
    return {op.__name__: sys.modules[op.__module__].OFFERED for op in _OPS}


__all__ = [
    "DEAL_STREAM",
    "GENERATION_STREAM",
    "PROMPT_ORDER_STREAM",
    "SCALAR_STREAM",
    "SHARED_STREAM",
    "BackendUnavailableError",
    "backend_for",
    "backends",
    "churn_stream",
    "deal_stream",
    "fdfo_loss",
    "feed_forward",
    "guided_velocity",
    "implementations",
    "lora_linear",
    "lora_linear_group",
    "pair_direction",
    "pair_scalar_normal",
    "paired_noise",
    "paired_step",
    "philox_normal",
    "philox_words",
    "replay",
]
