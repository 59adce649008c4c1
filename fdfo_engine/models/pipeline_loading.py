"""A diffusers pipeline from a folder or the hub: whole, or its transformer and VAE from their configs alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from fdfo_engine.config import ModelConfig
from fdfo_engine.models.pipeline_folder import require_parts, require_variant, variants
from fdfo_engine.models.quantized import compute_alike, packing, quantize
from fdfo_engine.runtime.errors import EnvironmentProblem
from fdfo_engine.runtime.hub import hub_reason


def load_pipeline(kind: Any, model_id: str, settings: ModelConfig, optional_parts: Sequence[str] = ()) -> Any:
    """The pipeline of class `kind` with all its parts on the CPU in `settings.dtype`; here weights are read.

    `optional_parts` are those that a folder may leave empty: diffusers loads it only if told so for each. A transformer
    that lies in four bits is on the GPU, where bitsandbytes reads it.

    Raises:
        EnvironmentProblem: it is neither in a folder nor to be had from the hub, a part of it is missing or damaged,
            its files are of another variant, or `settings.quantize` lacks its library.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    arguments = inspect.signature(kind.__init__).parameters.values()
    needed = [a.name for a in arguments if a.default is a.empty and a.name not in ("self", *optional_parts)]
    index = _index(kind, model_id, settings, needed)
    require_variant(model_id, settings.variant)
    given: dict[str, Any] = {part: None for part in optional_parts if index.get(part, [None])[0] is None}
    try:
        given |= _text_encoders(model_id, index, settings)
        pipeline = kind.from_pretrained(
            model_id,
            revision=settings.revision,
            variant=settings.variant,
            dtype=getattr(torch, settings.dtype),
            **given,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # also no GPU, or no library, for packed weights
        raise absent_model(model_id, error) from error
    _require_whole(model_id, pipeline)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            compute_alike(part)
    pipeline.set_progress_bar_config(disable=True)
    if settings.quantize:
        quantize(pipeline.transformer)
    return pipeline


def packing_of(kind: Any, model_id: str, settings: ModelConfig) -> str | None:
    """How the transformer's weights lie in their files, in words; None where they are whole.

    Raises:
        EnvironmentProblem: its config is neither in a folder nor to be had from the hub.
    """
    index = _index(kind, model_id, settings, ["transformer"])
    try:
        transformer = _class_of(diffusers, index["transformer"][1])
        config = transformer.load_config(model_id, subfolder="transformer", revision=settings.revision)
    except (OSError, ValueError) as error:
        raise absent_model(model_id, error) from error
    return packing(config)


def _index(kind: Any, model_id: str, settings: ModelConfig, needed: Sequence[str]) -> dict[str, Any]:
    """The contents of model_index.json, library and class of each part, of which `needed` must be there."""
    try:
        index: dict[str, Any] = kind.load_config(model_id, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise absent_model(model_id, error) from error
    require_parts(model_id, index, needed)
    return index


def _text_encoders(model_id: str, index: Mapping[str, Any], settings: ModelConfig) -> dict[str, nn.Module]:
    """Text encoders by part. Read here, since diffusers would not say that transformers made up what files lack."""
    encoders = {}
    for part, (library, name) in ((p, e) for p, e in index.items() if p.startswith("text_encoder")):
        if library != "transformers":
            continue
        has_variant = not Path(model_id).is_dir() or settings.variant in variants(Path(model_id) / part)
        encoders[part], report = _class_of(transformers, name).from_pretrained(
            model_id, subfolder=part, revision=settings.revision, variant=settings.variant if has_variant else None,
            dtype=getattr(torch, settings.dtype), output_loading_info=True,
        )  # fmt: skip
        if lacking := sorted(report["missing_keys"]):
            raise EnvironmentProblem(f"model.id = {model_id!r}: the files of its part {part} lack {lacking[0]}")
    return encoders


def _require_whole(model_id: str, pipeline: Any) -> None:
    """diffusers leaves a weight that the file lacks on the meta device, with a warning."""
    for part, module in pipeline.components.items():
        for name, weight in module.named_parameters() if isinstance(module, nn.Module) else ():
            if weight.is_meta:
                raise EnvironmentProblem(f"model.id = {model_id!r}: the files of its part {part} lack {name}")


def blank_pipeline(kind: Any, model_id: str, settings: ModelConfig) -> Any:
    """A pipeline of class `kind`: its scheduler, and its networks on the meta device; no tokenizer.

    Raises:
        EnvironmentProblem: the configs are neither in a folder nor to be had from the hub.
    """
    parts: dict[str, Any] = dict.fromkeys(list(inspect.signature(kind.__init__).parameters)[1:])
    counted = ("scheduler", "transformer", "vae")
    index = _index(kind, model_id, settings, counted)
    try:
        for part in counted:
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


def absent_model(model_id: str, error: Exception, revision: str | None = None) -> EnvironmentProblem:
    """What to raise where `model_id`, or a part of it, is not to be had or is damaged."""
    if refusal := hub_reason(model_id, error, revision=revision):
        return EnvironmentProblem(f"model.id = {model_id!r}: {refusal}")
    reason = f"model_index.json names no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
    if "no file named" in reason and not Path(model_id).is_dir():
        reason += " (where the repository has files of a variant only, such as *.fp16.safetensors, set model.variant)"
    return EnvironmentProblem(f"model.id = {model_id!r}: {reason}")


def _faked(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
