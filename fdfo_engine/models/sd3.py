"""Stable Diffusion 3 and 3.5, and the bundled miniature, over diffusers' own pipeline."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fdfo_engine.config import Config, ModelConfig
from fdfo_engine.models.flow_model import Conditioning, Grid, Network
from fdfo_engine.models.fused.choice import choose_blocks
from fdfo_engine.models.fused.fuse import own_forwards
from fdfo_engine.models.lora import ADAPTER, adapters_off, add_lora, fold_alpha, trainable
from fdfo_engine.models.sd3_blank import become_fake, blank_conditioning, blank_pipeline
from fdfo_engine.runtime.errors import CheckpointError, EnvironmentProblem, UsageError

ATTENTION_PROJECTIONS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""LoRA targets of the family: both streams of the joint attention, not SD3.5-M's second attention `attn2`."""

_OPTIONAL_PARTS = ("text_encoder_3", "tokenizer_3")
"""Parts that a folder may leave empty; diffusers loads it only if told so for each."""

EXPORT_TOLERANCE = 1e-5
"""Largest relative difference (rms) between the trained velocity and the exported one, in the model's float32."""


class SD3Model:
    """The `FlowModel` of SD3, SD3.5-M, SD3.5-L and every pipeline of their shape."""

    family = "sd3"

    def __init__(self, pipeline: Any, settings: ModelConfig, device: torch.device) -> None:
        self.pipeline = pipeline
        self.network: Any = pipeline.transformer
        self.device = device
        self.dtype = next(self.network.parameters()).dtype
        self._settings = settings
        factor = pipeline.vae_scale_factor
        self.latent_shape = (self.network.config.in_channels, settings.height // factor, settings.width // factor)
        self._lora_scale: float | None = None

    @classmethod
    def load(cls, config: Config, model_id: str, device: torch.device) -> SD3Model:
        """Loads the pipeline `model_id`, freezes it, and frees what is trained (`model.train`).

        Raises:
            UsageError: height or width do not fit the VAE and the patches, guidance is asked as an input,
                lora.targets match nothing, or the transformer does not fit what asks for fused blocks.
            EnvironmentProblem: the pipeline cannot be loaded, or `model.attention` can't run.
        """
        settings = config.model
        if config.sampling.embedded_guidance is not None:
            raise UsageError("sampling.embedded_guidance: the sd3 family takes none; set sampling.guidance_scale")
        pipeline = _load_pipeline(model_id, settings)
        for part in (pipeline.transformer, pipeline.vae):
            part.to(device)
        model = cls._prepared(pipeline, config, device)
        choose_blocks(model.network, settings, rehome=config.zero.stage < 3)
        return model

    @classmethod
    def blank(cls, config: Config, model_id: str, mode: FakeTensorMode) -> tuple[SD3Model, Conditioning]:
        """The model and one row of conditioning as fake tensors of `mode` on the CPU: for counting memory.

        On diffusers' own blocks, and `model.gradient_checkpointing: fc1` as false: fused ones keep less.

        Raises:
            UsageError, EnvironmentProblem: as `load`.
        """
        pipeline = blank_pipeline(model_id, config.model)
        model = cls._prepared(pipeline, config, torch.device("cpu"))
        if config.model.gradient_checkpointing is True:
            model.network.enable_gradient_checkpointing()
        with mode:
            for part in (pipeline.transformer, pipeline.vae):
                become_fake(part)
            return model, Conditioning(blank_conditioning(model_id, config.model, pipeline.transformer.config))

    @classmethod
    def _prepared(cls, pipeline: Any, config: Config, device: torch.device) -> SD3Model:
        """Freezes the pipeline and frees what is trained."""
        settings = config.model
        _check_size(pipeline, settings)
        for part in (pipeline.transformer, pipeline.vae, *_text_encoders(pipeline)):
            part.eval().requires_grad_(False)
        model = cls(pipeline, settings, device)
        if settings.train == "full":
            model.network.requires_grad_(True)
        else:
            targets = ATTENTION_PROJECTIONS if config.lora.targets == "family" else config.lora.targets
            try:
                add_lora(
                    model.network, rank=config.lora.rank, alpha=config.lora.alpha, targets=targets, seed=config.run.seed
                )
            except ValueError as error:
                raise UsageError(f"lora.targets = {list(targets)}: {error}") from error
            model._lora_scale = config.lora.alpha / config.lora.rank
        return model

    def grid(self, steps: int) -> Grid:
        """The grid of `StableDiffusion3Pipeline` itself, with its resolution-dependent shift where it has one."""
        scheduler = self.pipeline.scheduler
        kwargs = {}
        if scheduler.config.get("use_dynamic_shifting"):
            patch = self.network.config.patch_size
            tokens = (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)
            get = scheduler.config.get
            kwargs["mu"] = calculate_shift(
                tokens, get("base_image_seq_len", 256), get("max_image_seq_len", 4096),
                get("base_shift", 0.5), get("max_shift", 1.16),
            )  # fmt: skip
        scheduler.set_timesteps(steps, device="cpu", **kwargs)
        return Grid(scheduler.sigmas.clone(), scheduler.timesteps.clone())

    @contextmanager
    def text_encoders(self) -> Iterator[None]:
        """See `FlowModel.text_encoders`; an inner one is part of the outer."""
        encoders = _text_encoders(self.pipeline)
        moved = [e for e in encoders if next(e.parameters()).device != self.device]
        for encoder in moved:
            encoder.to(self.device)
        try:
            yield
        finally:
            for encoder in moved:
                encoder.to("cpu")

    def encode_prompt(self, prompt: str) -> Conditioning:
        """Joint text tokens and pooled vector, as the pipeline makes them."""
        with self.text_encoders():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=prompt,
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self._settings.max_sequence_length,
            )
        return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def velocity(self, network: Network, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `FlowModel.velocity`; the network is told `1000 * sigma`."""
        return network(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps.to(latents.device),
            return_dict=False,
            **conditioning.tensors,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """See `FlowModel.decode`."""
        vae = self.pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(scaled, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def without_adapter(self) -> AbstractContextManager[None]:
        """See `FlowModel.without_adapter`."""
        return adapters_off(self.network) if self._lora_scale is not None else nullcontext()

    def other_weights(self) -> Iterator[Tensor]:
        """See `FlowModel.other_weights`."""
        return self.pipeline.vae.parameters()  # type: ignore[no-any-return]

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See `FlowModel.trained_parameters`."""
        return trainable(self.network)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """A LoRA that `load_lora_weights` takes (alpha folded), or a pipeline folder after full training.

        Raises:
            CheckpointError: what was written does not give the same velocity when loaded back.
        """
        if self._lora_scale is None and Path(self.pipeline.config._name_or_path).resolve() == folder.resolve():
            raise UsageError(f"export: {folder} is the base model itself; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # written and verified aside: a wrong export is never seen, and a folder of the user's is only added to
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as name:
            aside = Path(name) / "export"
            if self._lora_scale is None:
                exported = self._export_pipeline(aside, weights)
            else:
                exported = self._export_lora(aside, weights, self._lora_scale)
            self._verify(exported, weights, folder)
            if folder.is_dir() and any(folder.iterdir()):
                shutil.copytree(aside, folder, dirs_exist_ok=True)
            else:
                os.replace(aside, folder)

    def _export_lora(self, folder: Path, weights: dict[str, Tensor], scale: float) -> nn.Module:
        folded = fold_alpha({_diffusers_name(n): w for n, w in weights.items()}, scale)
        StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=folded)
        fresh = self._fresh_pipeline(self.pipeline.config._name_or_path)
        fresh.load_lora_weights(folder)
        network: nn.Module = fresh.transformer
        return network

    def _export_pipeline(self, folder: Path, weights: dict[str, Tensor]) -> nn.Module:
        with _weights_in(self.network, weights):
            self.pipeline.save_pretrained(folder, safe_serialization=True)
        network: nn.Module = self._fresh_pipeline(str(folder)).transformer
        return network

    def _fresh_pipeline(self, model_id: str) -> Any:
        pipeline = _load_pipeline(model_id, self._settings)
        pipeline.transformer.to(self.device)
        return pipeline

    def _verify(self, exported: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, *self.latent_shape, generator=generator).to(self.device)
        timestep = torch.full((1,), 500.0)
        with torch.no_grad(), own_forwards(self.network), _weights_in(self.network, weights):
            conditioning = self.encode_prompt("a picture")
            trained = self.velocity(self.network, latents, timestep, conditioning).float()
            loaded = self.velocity(exported.eval(), latents, timestep, conditioning).float()
        error = ((loaded - trained).square().mean() / trained.square().mean().clamp_min(1e-30)).sqrt().item()
        limit = EXPORT_TOLERANCE if self.dtype == torch.float32 else 2e-2
        if not error <= limit:
            raise CheckpointError(f"export to {folder}: loaded back, its velocity is {error:.1e} off (limit {limit})")


class _weights_in:  # noqa: N801 - a context manager, read as a verb
    """Puts float32 `weights` into the network for a while; the network's own values come back after."""

    def __init__(self, network: nn.Module, weights: dict[str, Tensor]) -> None:
        self._parameters = dict(network.named_parameters())
        self._weights = weights

    def __enter__(self) -> None:
        self._saved = {name: self._parameters[name].detach().clone() for name in self._weights}
        self._write(self._weights)

    def __exit__(self, *_: object) -> None:
        self._write(self._saved)

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._parameters[name].copy_(weight)


def _diffusers_name(name: str) -> str:
    return name.replace(f".{ADAPTER}.", ".")


def _text_encoders(pipeline: Any) -> list[nn.Module]:
    return [e for e in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3) if e is not None]


def _load_pipeline(model_id: str, settings: ModelConfig) -> Any:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        index = StableDiffusion3Pipeline.load_config(model_id, revision=settings.revision)
        absent: dict[str, None] = {part: None for part in _OPTIONAL_PARTS if index.get(part, [None])[0] is None}
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            model_id, revision=settings.revision, dtype=getattr(torch, settings.dtype), **absent
        )
    except OSError as error:
        raise EnvironmentProblem(f"model.id = {model_id!r}: {str(error).splitlines()[0]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_size(pipeline: Any, settings: ModelConfig) -> None:
    unit = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    limit = pipeline.transformer.config.pos_embed_max_size * unit
    for key in ("height", "width"):
        value = getattr(settings, key)
        if value % unit or value > limit:
            raise UsageError(f"model.{key} = {value}: this model takes a multiple of {unit} up to {limit}")
