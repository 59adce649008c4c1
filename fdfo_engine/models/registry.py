"""Which family a model belongs to, and how it is loaded."""

import dataclasses
import difflib
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)
from torch import nn
from torch._subclasses import FakeTensorMode

from fdfo_engine.config import Config
from fdfo_engine.models.flow_model import FlowModel
from fdfo_engine.models.footprint import footprint
from fdfo_engine.models.known import known_configs
from fdfo_engine.models.pipeline_folder import names_a_file, why_no_pipeline
from fdfo_engine.models.quantized import quantized_bytes
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError
from fdfo_engine.runtime.memory import Footprint
from fdfo_engine.shapes.pipeline import shapes_base

FAMILIES = {
    "sd3": ("StableDiffusion3Pipeline", "fdfo_engine.models.sd3:SD3Model"),
    "flux": ("FluxPipeline", "fdfo_engine.models.flux:FluxModel"),
    "qwen_image": ("QwenImagePipeline", "fdfo_engine.models.qwen_image:QwenImageModel"),
}
"""Family to the diffusers pipeline class, as `model_index.json` names it, and to the code that runs it."""

_WANTS_AN_IMAGE = "it starts from an image beside the prompt, and a pair has only the prompt"
_OTHER_MODEL = "another architecture (text encoder, blocks, latents) that no family here runs"
REFUSED = {
    "Flux2Pipeline": _OTHER_MODEL,
    "Flux2KleinPipeline": _OTHER_MODEL,
    "ChromaPipeline": _OTHER_MODEL,
    "FluxKontextPipeline": _WANTS_AN_IMAGE,
    "FluxFillPipeline": _WANTS_AN_IMAGE,
    "FluxControlPipeline": _WANTS_AN_IMAGE,
    "FluxControlNetPipeline": _WANTS_AN_IMAGE,
    "FluxPriorReduxPipeline": "it makes embeddings of an image, no image",
    "StableDiffusion3ControlNetPipeline": _WANTS_AN_IMAGE,
    "QwenImageControlNetPipeline": _WANTS_AN_IMAGE,
    "QwenImageEditPipeline": _WANTS_AN_IMAGE,
    "QwenImageEditPlusPipeline": _WANTS_AN_IMAGE,
    "QwenImage21Pipeline": _OTHER_MODEL,
    "QwenImageLayeredPipeline": "it makes layers, not one image",
}
"""Relatives of the families that are not taken, and why."""


def resolve_model_id(model_id: str) -> str:
    """`shapes` is the bundled miniature; anything else is a folder or a hub id, as it stands."""
    return str(shapes_base()) if model_id == "shapes" else model_id


def load_model(config: Config, device: torch.device) -> FlowModel:
    """Loads `config.model` with its adapter, if any, on `device`.

    Raises:
        UsageError: the family is unknown, or a `module:attribute` family cannot be imported.
        EnvironmentProblem: the model is neither a pipeline folder nor to be had from the hub.
    """
    source = resolve_model_id(config.model.id)
    model: FlowModel = _loader(config, source).load(config, source, device)
    return model


def blank_footprint(config: Config) -> Footprint:
    """Sizes of `config.model` from its configs alone: no weight is read, and none takes memory.

    A hub model whose configs are shipped (`models/known`) is counted from those.

    Raises:
        UsageError, EnvironmentProblem: as `load_model`, or the family cannot be counted without its weights.
    """
    source = resolve_model_id(config.model.id)
    if known := known_configs(config.model.id):
        source = str(known)
        say(f"model.id = {config.model.id!r}: counted from the configs that are shipped for it")
    loader = _loader(config, source)
    if not hasattr(loader, "blank"):
        raise UsageError(f"model.family = {config.model.family!r}: has no `blank`, so it cannot be counted unloaded")
    with _without_advice():
        mode = FakeTensorMode()
        model, conditioning = loader.blank(config, source, mode)
        with mode:
            found = footprint(model, conditioning, config.model.height, config.model.width)
    return _packed(found, model.network) if getattr(model, "packed_by", None) else found


def _packed(counted: Footprint, network: nn.Module) -> Footprint:
    """`counted` with the weights of the blocks in four bits, one of which is unpacked at a time."""
    saved, largest = quantized_bytes(network)
    lines = {name: getattr(counted, name) for name in ("forward", "training")}
    unpacked = {name: line._replace(fixed=line.fixed + largest) for name, line in lines.items()}
    return dataclasses.replace(counted, frozen=counted.frozen - saved, **unpacked)


def _loader(config: Config, source: str) -> Any:
    """The class of the family of the pipeline `source`."""
    family = config.model.family
    if family == "auto" or family in FAMILIES:
        family = _family_of(source, config.model.revision, family)
    target = FAMILIES[family][1] if family in FAMILIES else family
    if ":" not in target:
        near = difflib.get_close_matches(family, FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"model.family = {family!r}: takes auto, one of {sorted(FAMILIES)}, or module:attribute{hint}")
    module, attribute = target.split(":", 1)
    try:
        with _without_advice():
            return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"model.family = {family!r}: {error}") from error


@contextmanager
def _without_advice() -> Iterator[None]:
    """transformers advises to install torchvision for image processors that no text-to-image pipeline uses."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _family_of(model_id: str, revision: str | None, wanted: str) -> str:
    """The family of a pipeline's class; `wanted`, unless it is auto, where its class is of no other family."""
    file = model_index(model_id, revision)
    try:
        name = json.loads(file.read_text()).get("_class_name", "")
    except (ValueError, AttributeError) as error:
        raise EnvironmentProblem(
            f"model.id = {model_id!r}: {file} is no list of a pipeline's parts: {error}"
        ) from error
    pipelines = {pipeline: family for family, (pipeline, _) in FAMILIES.items()}
    if name in REFUSED:
        raise UsageError(f"model.id = {model_id!r} is a {name}: {REFUSED[name]}; takes one of {sorted(pipelines)}")
    found = pipelines.get(name, wanted)
    if found == "auto":
        raise UsageError(f"model.id = {model_id!r} is a {name}: takes one of {sorted(pipelines)}")
    if wanted not in ("auto", found):
        raise UsageError(f"model.family = {wanted!r}: model.id = {model_id!r} is a {name}, of the {found} family")
    return found


def model_index(model_id: str, revision: str | None) -> Path:
    """The pipeline's `model_index.json`, in its folder or in the hub's cache.

    Raises:
        EnvironmentProblem: there is none.
    """
    local = Path(model_id) / "model_index.json"
    if local.is_file():
        return local
    if Path(model_id).is_dir() or names_a_file(model_id):
        raise EnvironmentProblem(f"model.id = {model_id!r}: {why_no_pipeline(model_id)}")
    try:
        return Path(hf_hub_download(model_id, "model_index.json", revision=revision))
    except RemoteEntryNotFoundError as error:
        reason = "its repository has no model_index.json: it holds no diffusers pipeline, or files to make one of"
        raise EnvironmentProblem(f"model.id = {model_id!r}: {reason}") from error
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise EnvironmentProblem(f"model.id = {model_id!r}: no such folder, and the hub gave none: {reason}") from error
