"""Which blocks a run computes with: the fused ones, or diffusers' own, compiled where that is asked for."""

from typing import Any

from fdfo_engine.config import ModelConfig
from fdfo_engine.models.fused.fuse import fuse
from fdfo_engine.models.fused.refusals import fusion_refusals
from fdfo_engine.ops import BackendUnavailableError, block_backend
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError


def choose_blocks(transformer: Any, settings: ModelConfig, *, rehome: bool) -> None:
    """Fuses or compiles `transformer` as `settings` ask; `fused: auto` says where it does not fit. `rehome`: `fuse`.

    Raises:
        UsageError: it does not fit, and `fused: true` or a setting that only fused blocks know asks for it.
        EnvironmentProblem: `attention` can't run here.
    """
    reasons = _refusals(transformer, settings)
    if not reasons and settings.fused == "auto" and block_backend(transformer.proj_out.weight.device) == "torch":
        reasons = ["its ops would run on plain torch here; fdfo doctor says why"]
    if not reasons:
        recompute = {False: "none", True: "block", "fc1": "fc1"}[settings.gradient_checkpointing]
        try:
            fuse(
                transformer, attention=settings.attention, recompute=recompute, rehome=rehome,
                required=settings.fused is True,
            )  # fmt: skip
        except BackendUnavailableError as error:
            raise EnvironmentProblem(f"model.attention = {settings.attention}: {error}") from error
        return
    _refuse_where_needed(settings, reasons)
    if settings.fused == "auto":
        say(f"model: diffusers' own blocks, not the fused ones: {'; '.join(reasons)}")
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if settings.compile:
        transformer.compile()


def refuse_unfit(transformer: Any, settings: ModelConfig) -> None:
    """Refuses what `choose_blocks` would, of a transformer without weights.

    Raises:
        UsageError: as there.
    """
    if reasons := _refusals(transformer, settings):
        _refuse_where_needed(settings, reasons)


def _refuse_where_needed(settings: ModelConfig, reasons: list[str]) -> None:
    why = "; ".join(reasons)
    if settings.fused is True:
        raise UsageError(f"model.fused = true: this model does not fit the fused blocks: {why}")
    if settings.attention not in ("auto", "sdpa"):
        raise UsageError(f"model.attention = {settings.attention}: only fused blocks know it, and here {why}")
    if settings.gradient_checkpointing == "fc1":
        raise UsageError(f"model.gradient_checkpointing = fc1: only fused blocks know it, and here {why}")


def _refusals(transformer: Any, settings: ModelConfig) -> list[str]:
    if settings.compile:
        return ["model.compile is true"]
    if settings.fused is False:
        return ["model.fused is false"]
    if settings.quantize:
        return [f"model.quantize is {settings.quantize}"]
    return fusion_refusals(transformer)
