"""The styles of an export, and which of them a run cannot have; imports no torch, so that a refusal comes at once."""

from __future__ import annotations

from typing import Literal

from fdfo_engine.config import ModelConfig
from fdfo_engine.runtime.errors import UsageError

ExportStyle = Literal["diffusers", "comfyui", "merged"]


def refuse_style(style: ExportStyle, settings: ModelConfig, name: str | None = None) -> None:
    """Refuses a style that a run of these settings cannot have; no model is needed to know.

    Args:
        style: of the export.
        settings: of the run's model.
        name: what the message calls the style.

    Raises:
        UsageError: comfyui or merged after full training; merged of a run on quantised weights.
    """
    name = name or f"export: style {style}"
    if style != "diffusers" and settings.train == "full":
        raise UsageError(f"{name} is a LoRA's, and this run trains every weight; takes diffusers")
    if style == "merged" and settings.quantize:
        raise UsageError(
            f"{name}: the LoRA was trained on weights in {settings.quantize}, to which nothing can be added exactly; "
            "takes diffusers or comfyui"
        )
