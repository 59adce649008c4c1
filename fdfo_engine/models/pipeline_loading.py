"""A diffusers pipeline from a folder or the hub: whole, or its transformer and VAE from their configs alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from fdfo_engine.config import ModelConfig
from fdfo_engine.models.quantized import quantize
from fdfo_engine.runtime.errors import EnvironmentProblem


def load_pipeline(kind: Any, model_id: str, settings: ModelConfig, optional_parts: Sequence[str] = ()) -> Any:
    """The pipeline of class `kind` with all its parts on the CPU in `settings.dtype`; here weights are read.

    `optional_parts` are those that a folder may leave empty: diffusers loads it only if told so for each.

    Raises:
        EnvironmentProblem: it is neither in a folder nor to be had from the hub, a part of it is missing, or
            `settings.quantize` lacks its library.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        index = kind.load_config(model_id, revision=settings.revision)
        absent: dict[str, None] = {part: None for part in optional_parts if index.get(part, [None])[0] is None}
        pipeline = kind.from_pretrained(
            model_id, revision=settings.revision, dtype=getattr(torch, settings.dtype), **absent
        )
    except (OSError, ValueError) as error:
        raise absent_model(model_id, error) from error
    pipeline.set_progress_bar_config(disable=True)
    if settings.quantize:
        quantize(pipeline.transformer)
    return pipeline


def blank_pipeline(kind: Any, model_id: str, settings: ModelConfig) -> Any:
    """A pipeline of class `kind`: its scheduler, and its networks on the meta device; no tokenizer.

    Raises:
        EnvironmentProblem: the configs are neither in a folder nor to be had from the hub.
    """
    parts: dict[str, Any] = dict.fromkeys(list(inspect.signature(kind.__init__).parameters)[1:])
    try:
        index = kind.load_config(model_id, revision=settings.revision)
        for part in ("scheduler", "transformer", "vae"):
            part_class = _class_of(diffusers, index[part][1])
            config = part_class.load_config(model_id, subfolder=part, revision=settings.revision)
            with torch.device("cpu" if part == "scheduler" else "meta"):
                parts[part] = part_class.from_config(config)
        for part in (name for name in index if name.startswith("text_encoder") and index[name][0]):
            part_class = _class_of(transformers, index[part][1])
            config = part_class.config_class.from_pretrained(model_id, subfolder=part, revision=settings.revision)
            with torch.device("meta"):
                parts[part] = part_class(config)
        for network in (part for part in parts.values() if isinstance(part, nn.Module)):
            nn.Module.to(network, getattr(torch, settings.dtype))
    except (OSError, ValueError, KeyError) as error:
        raise absent_model(model_id, error) from error
    return kind(**parts)


def _class_of(library: Any, name: str) -> Any:
    if not hasattr(library, name):
        raise ValueError(f"{library.__name__} has no {name}")
    return getattr(library, name)


def become_fake(network: nn.Module) -> None:
    """Replaces meta tensors by fake ones on the CPU, of the fake mode in force: attention counts as it runs."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_faked(parameter), parameter.requires_grad)
        for tensors in (module._buffers, vars(module)):  # rotary tables are plain attributes in some models
            tensors |= {name: _faked(t) for name, t in tensors.items() if isinstance(t, torch.Tensor)}


def absent_model(model_id: str, error: Exception) -> EnvironmentProblem:
    """What to raise where `model_id`, or a part of it, is not to be had or is damaged."""
    reason = f"model_index.json names no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
    return EnvironmentProblem(f"model.id = {model_id!r}: {reason}")


def _faked(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
