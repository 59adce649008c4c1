"""Which blocks a run computes with: the fused ones, or diffusers' own."""

from typing import Any

from fdfo_engine.config import ModelConfig
from fdfo_engine.models.fused.fuse import fuse
from fdfo_engine.models.fused.refusals import fusion_refusals
from fdfo_engine.ops import BackendUnavailableError
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError


def choose_blocks(transformer: Any, settings: ModelConfig, *, rehome: bool) -> None:
    """Fuses `transformer` as `settings` ask; `fused: auto` says where it does not fit. For `rehome` see `fuse`.

    Raises:
        UsageError: it does not fit, and `fused: true` or a setting that only fused blocks know asks for it.
        EnvironmentProblem: `attention` can't run here.
    """
    reasons = ["model.fused is false"] if settings.fused is False else fusion_refusals(transformer)
    if not reasons:
        recompute = {False: "none", True: "block", "fc1": "fc1"}[settings.gradient_checkpointing]
        try:
            fuse(transformer, attention=settings.attention, recompute=recompute, rehome=rehome)
        except BackendUnavailableError as error:
            raise EnvironmentProblem(f"model.attention = {settings.attention}: {error}") from error
        return
    why = "; ".join(reasons)
    if settings.fused is True:
        raise UsageError(f"model.fused = true: this model does not fit the fused blocks: {why}")
    if settings.attention not in ("auto", "sdpa"):
        raise UsageError(f"model.attention = {settings.attention}: only fused blocks know it, and here {why}")
    if settings.gradient_checkpointing == "fc1":
        raise UsageError(f"model.gradient_checkpointing = fc1: only fused blocks know it, and here {why}")
    if settings.fused == "auto":
        say(f"model: diffusers' own blocks, not the fused ones: {why}")
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
