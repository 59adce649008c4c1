"""Public ops: the only surface other frontends import kernels through."""

import inspect
import sys

import torch

from fdfo_engine.ops._checks import MAX_HEAD_SIZE, NORM_EPS, Solver, moved
from fdfo_engine.ops._choices import Call, Choices, Chooser, Shape, chosen, current_chooser, named, under
from fdfo_engine.ops._dispatch import (
    BACKENDS,
    LIBRARY,
    BackendUnavailableError,
    backend_for,
    backends,
    block_backend,
    candidates,
    choose,
)
from fdfo_engine.ops._norm_streams import NormStream
from fdfo_engine.ops.adapted_projections import adapted_projection, adapted_projections, ends_inside
from fdfo_engine.ops.fdfo_loss import fdfo_loss
from fdfo_engine.ops.feed_forward import feed_forward
from fdfo_engine.ops.gated_residual import gated_residual
from fdfo_engine.ops.gated_residual_norm import Residual, gated_residual_norm, gated_residual_norms
from fdfo_engine.ops.guided_velocity import guided_velocity
from fdfo_engine.ops.layer_norm_modulate import layer_norm_modulate
from fdfo_engine.ops.log_ratio import log_ratio
from fdfo_engine.ops.pair_direction import pair_direction
from fdfo_engine.ops.paired_noise import paired_noise
from fdfo_engine.ops.paired_step import paired_step
from fdfo_engine.ops.philox import (
    DEAL_STREAM,
    GENERATION_STREAM,
    IMPORTANCE_STREAM,
    PROMPT_ORDER_STREAM,
    RENOISE_STREAM,
    SCALAR_STREAM,
    SHARED_STREAM,
    churn_stream,
    deal_stream,
    philox_words,
    renoise_stream,
)
from fdfo_engine.ops.philox_normal import pair_scalar_normal, philox_normal
from fdfo_engine.ops.projection import Adapter, Gelu, HeadNorm, IntoResidual, Packed, Projected, Projection
from fdfo_engine.ops.qk_rms_norm import QKV, is_invertible, qk_rms_norm
from fdfo_engine.ops.replay import replay

__all__ = [
    "BACKENDS",
    "DEAL_STREAM",
    "GENERATION_STREAM",
    "IMPORTANCE_STREAM",
    "LIBRARY",
    "MAX_HEAD_SIZE",
    "NORM_EPS",
    "PROMPT_ORDER_STREAM",
    "QKV",
    "RENOISE_STREAM",
    "SCALAR_STREAM",
    "SHARED_STREAM",
    "Adapter",
    "BackendUnavailableError",
    "Call",
    "Choices",
    "Chooser",
    "Gelu",
    "HeadNorm",
    "IntoResidual",
    "NormStream",
    "Packed",
    "Projected",
    "Projection",
    "Residual",
    "Shape",
    "Solver",
    "adapted_projection",
    "adapted_projections",
    "backend_for",
    "backends",
    "block_backend",
    "candidates",
    "chosen",
    "chosen_backend",
    "churn_stream",
    "current_chooser",
    "deal_stream",
    "ends_inside",
    "fdfo_loss",
    "feed_forward",
    "gated_residual",
    "gated_residual_norm",
    "gated_residual_norms",
    "guided_velocity",
    "implementations",
    "is_invertible",
    "layer_norm_modulate",
    "log_ratio",
    "moved",
    "named",
    "pair_direction",
    "pair_scalar_normal",
    "paired_noise",
    "paired_step",
    "philox_normal",
    "philox_words",
    "qk_rms_norm",
    "renoise_stream",
    "replay",
    "under",
]


def implementations() -> dict[str, tuple[str, ...]]:
    """The backends that each op is implemented in, by the op's name: every public function that takes a `backend`."""
    public = (globals()[name] for name in __all__)
    functions = [item for item in public if inspect.isfunction(item)]
    ops = [op for op in functions if "backend" in inspect.signature(op).parameters]
    return {op.__name__: sys.modules[op.__module__].OFFERED for op in ops}


def chosen_backend(op: str, device: torch.device) -> str:
    """The backend that the op of this name takes on `device` where none is forced.

    Raises:
        BackendUnavailableError: none can run there; with every reason.
    """
    return choose(op, implementations()[op], device)
