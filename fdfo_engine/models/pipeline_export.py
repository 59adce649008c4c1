"""A trained network written as one of the export's styles, loaded back, and held against what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fdfo_engine.models.export_checks import require_adapter, require_weights
from fdfo_engine.models.finite import blame, is_finite
from fdfo_engine.models.fused.fuse import own_forwards
from fdfo_engine.models.lora import merge, weights_in
from fdfo_engine.models.native_lora import add_native, to_native
from fdfo_engine.models.pipeline_loading import load_pipeline
from fdfo_engine.models.quantized import FOUR_BITS, unpack
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import CheckpointError, NumericsError, UsageError

if TYPE_CHECKING:
    from fdfo_engine.models.pipeline_model import PipelineModel

EXPORT_TOLERANCE = 1e-6
"""Largest relative difference (rms) between the trained velocity and the exported one, in the model's float32."""

NATIVE_FILE = "lora_comfyui.safetensors"
"""What an export in style comfyui writes."""


def loads_lora(pipeline_class: Any) -> bool:
    """Whether pipelines of the class take a LoRA: an export in style diffusers is for those that do."""
    return hasattr(pipeline_class, "load_lora_weights")


class PipelineExport:
    """Writes into a folder that is not there yet; each `write` returns the transformer as it was loaded back."""

    def __init__(self, model: PipelineModel) -> None:
        self._model = model
        self._base: str = model.pipeline.config._name_or_path

    def write_native(self, folder: Path, folded: dict[str, Tensor]) -> nn.Module:
        """A LoRA in the names of the model's original code."""
        model = self._model
        folder.mkdir()
        save_file(to_native(folded, model.network, model.native_layers), folder / NATIVE_FILE)
        network: nn.Module = self._loaded_base().transformer
        if model.packed_by:  # nothing can be added to packed weights
            unpack(network, model.dtype)
        add_native(network, load_file(folder / NATIVE_FILE, device=str(model.device)), model.native_layers)
        return network

    def write_lora(self, folder: Path, folded: dict[str, Tensor]) -> nn.Module:
        """A LoRA as `load_lora_weights` takes it.

        Raises:
            UsageError: the pipeline has no such method.
        """
        pipeline_class = self._model.pipeline_class
        if not loads_lora(pipeline_class):
            raise UsageError(f"export: style diffusers: a {pipeline_class.__name__} loads no LoRA; takes merged")
        pipeline_class.save_lora_weights(folder, transformer_lora_layers=folded)
        fresh = self._loaded_base()
        fresh.load_lora_weights(folder)
        network: nn.Module = fresh.transformer
        require_adapter(network, folded, folder)
        return network

    def write_merged(self, folder: Path, folded: dict[str, Tensor]) -> nn.Module:
        """A pipeline folder with the LoRA added to its weights."""
        model = self._model
        pipeline = load_pipeline(model.pipeline_class, self._base, model.settings, model.optional_parts)
        lost = merge(pipeline.transformer, folded)
        say(f"merged into {model.settings.dtype} weights, whose change is {lost:.1%} off the LoRA's (rms)")
        pipeline.save_pretrained(folder, safe_serialization=True)
        return self._loaded_export(folder)

    def write_pipeline(self, folder: Path, weights: dict[str, Tensor]) -> nn.Module:
        """A pipeline folder with all weights as they were trained."""
        model = self._model
        with weights_in(model.network, weights):
            model.pipeline.save_pretrained(folder, safe_serialization=True)
        network = self._loaded_export(folder)
        require_weights(network, weights, folder)
        return network

    def verify(self, exported: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
        """Holds the velocity of `exported` against that of the model with `weights`.

        Raises:
            CheckpointError: they differ.
            NumericsError: the model's own is not finite.
        """
        model = self._model
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, *model.latent_shape, generator=generator).to(model.device)
        timestep = torch.full((1,), 500.0)
        with torch.no_grad(), own_forwards(model.network), weights_in(model.network, weights):
            conditioning = model.encode_prompt("a picture")
            trained = model.velocity(model.network, latents, timestep, conditioning).float()
            loaded = model.velocity(exported.eval(), latents, timestep, conditioning).float()
        if not is_finite(trained):
            raise NumericsError(f"export: the trained model's velocity is not finite{blame(model)}")
        error = ((loaded - trained).square().mean() / trained.square().mean().clamp_min(1e-30)).sqrt().item()
        is_exact = model.dtype == torch.float32 and model.packed_by != FOUR_BITS  # such files have a dtype of their own
        limit = EXPORT_TOLERANCE if is_exact else 2e-2
        if not error <= limit:
            raise CheckpointError(f"export to {folder}: loaded back, its velocity is {error:.1e} off (limit {limit})")

    def _loaded_base(self) -> Any:
        model = self._model
        pipeline = load_pipeline(model.pipeline_class, self._base, model.settings, model.optional_parts)
        pipeline.transformer.to(model.device)
        return pipeline

    def _loaded_export(self, folder: Path) -> nn.Module:
        """The transformer of a pipeline folder that was written here: whole weights, of no variant."""
        model = self._model
        settings = model.settings.model_copy(update={"variant": None})
        pipeline = load_pipeline(model.pipeline_class, str(folder), settings, model.optional_parts)
        network: nn.Module = pipeline.transformer.to(model.device)
        return network
