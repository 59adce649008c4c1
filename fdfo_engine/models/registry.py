"""Which family a model belongs to, and how it is loaded."""

import difflib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from fdfo_engine.config import Config
from fdfo_engine.models.advice import without_advice
from fdfo_engine.models.base_model import Base, find_base, model_index, resolve_model_id
from fdfo_engine.models.few_steps import refuse_many_steps
from fdfo_engine.models.flow_model import Conditioning, FlowModel
from fdfo_engine.models.known import known_configs
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.distributed import all_agree_hash, together_patiently
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError
from fdfo_engine.runtime.json_text import json_object
from fdfo_engine.runtime.own_code import own_callable

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


def locate_base(config: Config) -> Base:
    """The base model of `config` on this machine, where it is fetched from the hub if need be; see `find_base`.

    Raises:
        UsageError: the family is unknown, or not that of the pipeline.
        EnvironmentProblem: the model is neither a pipeline folder nor to be had from the hub.
    """
    loader = _loader(config, resolve_model_id(config.model.id))
    with without_advice():
        return find_base(config.model, getattr(loader, "pipeline_class", None))


def require_model(config: Config) -> Path | None:
    """Asks whether `config.model` is of a family, and here or given by the hub: of it only the index is fetched.

    Returns:
        The folder of its index: the pipeline's own, or what the hub's cache holds of it so far; None where a family of
        one's own looks elsewhere.

    Raises:
        UsageError, EnvironmentProblem: as `locate_base`.
    """
    source = resolve_model_id(config.model.id)
    loader = _loader(config, source)
    return model_index(source, config.model.revision).parent if hasattr(loader, "pipeline_class") else None


def agreed_base(config: Config) -> Base:
    """`locate_base` with its record, on every rank; collective, and patient while files are fetched and hashed.

    Raises:
        UsageError, EnvironmentProblem: as `locate_base`; ranks that find different models.
    """

    def located() -> Base:
        base = locate_base(config)
        _ = base.record
        return base

    base = together_patiently(located)
    all_agree_hash(base.source if base.record is None else base.record.text, "the base model")
    return base


def load_model(config: Config, device: torch.device, base: Base | None = None) -> FlowModel:
    """Loads `config.model` with its adapter, if any, on `device`; `base` where it was located already.

    Raises:
        UsageError: the family is unknown, or a `module:attribute` family cannot be imported; more steps than the model
            was distilled to.
        EnvironmentProblem: the model is neither a pipeline folder nor to be had from the hub.
    """
    base = base or locate_base(config)
    if base.folder is not None:
        refuse_many_steps(config, base.folder)
    model: FlowModel = _loader(config, base.source).load(config, base.source, device)
    return model


def blank_model(config: Config, mode: FakeTensorMode) -> tuple[FlowModel, Conditioning]:
    """`config.model` and one row of its conditioning as fake tensors of `mode`: no weight is read or takes memory.

    A hub model whose configs are shipped (`models/known`) is made from those.

    Raises:
        UsageError, EnvironmentProblem: as `load_model`, or the family can't be made without its weights.
    """
    source = resolve_model_id(config.model.id)
    if known := known_configs(config.model.id):
        source = str(known)
        say(f"model.id = {config.model.id!r}: counted from the configs that are shipped for it")
    loader = _loader(config, source)
    if not hasattr(loader, "blank"):
        raise UsageError(f"model.family = {config.model.family!r}: has no `blank`, so it cannot be counted unloaded")
    with without_advice():
        blank: tuple[FlowModel, Conditioning] = loader.blank(config, source, mode)
        if hasattr(loader, "pipeline_class"):
            refuse_many_steps(config, model_index(source, config.model.revision).parent)
    return blank


def _loader(config: Config, source: str) -> Any:
    """The class of the family of the pipeline `source`."""
    family = config.model.family
    if family == "auto" or family in FAMILIES:
        family = _family_of(source, config.model.revision, family)
    with without_advice():
        if family not in FAMILIES and ":" in family:
            return own_callable(family, "model.family")
        if family not in FAMILIES:
            near = difflib.get_close_matches(family, FAMILIES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            takes = f"auto, one of {sorted(FAMILIES)}, or module:attribute"
            raise UsageError(f"model.family = {family!r}: takes {takes}{hint}")
        module, _, attribute = FAMILIES[family][1].partition(":")
        return getattr(importlib.import_module(module), attribute)


def _family_of(model_id: str, revision: str | None, wanted: str) -> str:
    """The family of a pipeline's class; `wanted`, unless it is auto, where its class is of no other family."""
    file = model_index(model_id, revision)
    try:
        name = str(json_object(file.read_bytes()).get("_class_name", ""))
    except ValueError as error:
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
