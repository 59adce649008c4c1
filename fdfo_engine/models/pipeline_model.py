"""What every family over a diffusers pipeline has in common: a family adds its grid, its inputs and its VAE's rule."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fdfo_engine.config import Config
from fdfo_engine.models.export_styles import ExportStyle, refuse_style
from fdfo_engine.models.finite import first_bad
from fdfo_engine.models.flow_model import Conditioning, Grid, Network, TokenLimit
from fdfo_engine.models.fused.choice import choose_blocks, refuse_unfit
from fdfo_engine.models.lora import (
    ADAPTER,
    ATTENTION_PROJECTIONS,
    adapters_off,
    add_lora,
    fold_alpha,
    trainable,
)
from fdfo_engine.models.lora_targets import describe_layers, of_any_block, target_layers
from fdfo_engine.models.native_lora import NativeLayers, layers_without_name
from fdfo_engine.models.pipeline_export import PipelineExport, loads_lora
from fdfo_engine.models.pipeline_loading import become_fake, blank_pipeline, load_pipeline, packing_of
from fdfo_engine.models.quantized import refuse_packed
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.durable import open_to_readers
from fdfo_engine.runtime.errors import NumericsError, UsageError


class PipelineModel:
    """The part of a `FlowModel` that is the same for every family.

    A family sets `family` and `pipeline_class` and defines `size_rule`, `latent_channels`, `grid`, `encode_prompt`,
    `velocity` and `blank_row`; where its pipeline has rules of its own also `guided`, `decode` and what is refused.
    """

    family: ClassVar[str]
    pipeline_class: ClassVar[Any]
    optional_parts: ClassVar[tuple[str, ...]] = ()
    """Parts that a pipeline folder may leave empty."""

    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION_PROJECTIONS
    """What `lora.targets: family` stands for: ends of module names."""

    native_layers: ClassVar[NativeLayers] = {}
    """Names and fused layers of the model's original code, for exports in style comfyui."""

    takes_embedded_guidance: ClassVar[bool] = False
    """Whether models of the family may take guidance as an input."""

    def __init__(self, pipeline: Any, config: Config, device: torch.device) -> None:
        self.pipeline = pipeline
        self.network: Any = pipeline.transformer
        self.device = device
        self.settings = config.model
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)  # of packed weights, what they compute in
        self.packed_by: str | None = config.model.quantize
        factor = pipeline.vae_scale_factor
        self.latent_shape = (
            self.latent_channels(pipeline),
            self.settings.height // factor,
            self.settings.width // factor,
        )
        self._lora_scale: float | None = None

    @classmethod
    def load(cls, config: Config, model_id: str, device: torch.device) -> Self:
        """Loads the pipeline `model_id`, freezes it, and frees what is trained (`model.train`).

        Raises:
            UsageError: height or width do not fit the model, a setting is not for this family, lora.targets match
                nothing, or the transformer does not fit what asks for fused blocks.
            EnvironmentProblem: the pipeline cannot be loaded, or `model.attention` can't run.
        """
        cls.refuse_settings(config)
        packed_by = packing_of(cls.pipeline_class, model_id, config.model)
        refuse_packed(config, packed_by)
        pipeline = load_pipeline(cls.pipeline_class, model_id, config.model, cls.optional_parts)
        for part in (pipeline.transformer, pipeline.vae):
            part.to(device)
        model = cls._prepared(pipeline, config, device)
        model.packed_by = model.packed_by or packed_by
        choose_blocks(model.network, config.model, rehome=config.zero.stage < 3)
        if model.packed_by:
            say(f"model: its blocks are kept in {model.packed_by}; the quantised model is what is trained")
        return model

    @classmethod
    def blank(cls, config: Config, model_id: str, mode: FakeTensorMode) -> tuple[Self, Conditioning]:
        """The model and one row of conditioning as fake tensors of `mode` on the CPU: for counting memory.

        On diffusers' own blocks, and `model.gradient_checkpointing: fc1` as false: fused ones keep less.

        Raises:
            UsageError, EnvironmentProblem: as `load`.
        """
        cls.refuse_settings(config)
        packed_by = packing_of(cls.pipeline_class, model_id, config.model)
        refuse_packed(config, packed_by)
        pipeline = blank_pipeline(cls.pipeline_class, model_id, config.model)
        model = cls._prepared(pipeline, config, torch.device("cpu"))
        model.packed_by = model.packed_by or packed_by
        refuse_unfit(model.network, config.model)
        if config.model.gradient_checkpointing is True:
            model.network.enable_gradient_checkpointing()
        with mode:
            for part in (pipeline.transformer, pipeline.vae):
                become_fake(part)
            return model, Conditioning(model.blank_row())

    @classmethod
    def _prepared(cls, pipeline: Any, config: Config, device: torch.device) -> Self:
        """Freezes the pipeline and frees what is trained."""
        cls.refuse_pipeline(pipeline, config)
        for part in (pipeline.transformer, pipeline.vae, *_text_encoders(pipeline)):
            part.eval().requires_grad_(False)
        model = cls(pipeline, config, device)
        if config.model.train == "full":
            model.network.requires_grad_(True)
            return model
        model._add_lora(config)
        return model

    def _add_lora(self, config: Config) -> None:
        lora, network = config.lora, self.network
        targets = self.lora_targets if lora.targets == "family" else lora.targets
        parts = self.pipeline.components.items()
        others = {name: part for name, part in parts if isinstance(part, nn.Module) and part is not network}
        try:
            if lora.targets != "family":
                target_layers(network, targets, others)  # each of them has to name a layer
            layers = add_lora(network, rank=lora.rank, alpha=lora.alpha, targets=targets, seed=config.run.seed)
        except ValueError as error:
            raise UsageError(f"lora.targets = {list(targets)}: {error}") from error
        self._lora_scale = lora.alpha / lora.rank
        if not loads_lora(self.pipeline_class):
            say(f"lora: a {self.pipeline_class.__name__} loads no LoRA: export takes style merged")
        if lora.targets == "family":
            return
        say(f"lora: {describe_layers(layers)}")
        if unnamed := layers_without_name(network, layers, self.native_layers):
            names = list(dict.fromkeys(map(of_any_block, unnamed)))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            say(f"lora: export in style comfyui has no name for {', '.join(names[:3])}{more}; diffusers and merged do")

    @classmethod
    def refuse_settings(cls, config: Config) -> None:
        """Refuses settings that are not for this family, before anything is loaded.

        Raises:
            UsageError: such a setting, with its key.
        """
        if config.model.dtype == "float16" and config.model.train == "full":
            raise UsageError(
                "model.dtype = float16: in it gradients of weights vanish; with model.train = full takes bfloat16 or "
                "float32"
            )
        if config.sampling.embedded_guidance is not None and not cls.takes_embedded_guidance:
            raise UsageError(
                f"sampling.embedded_guidance: the {cls.family} family takes none; set sampling.guidance_scale"
            )

    @classmethod
    def refuse_pipeline(cls, pipeline: Any, config: Config) -> None:
        """Refuses a pipeline that `config` does not fit.

        Raises:
            UsageError: height or width, with what the model takes; another sampler than plain Euler.
        """
        scheduler = pipeline.scheduler
        flags = [flag for flag in ("stochastic_sampling", "invert_sigmas") if scheduler.config.get(flag)]
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or flags:
            raise UsageError(
                f"model.id = {config.model.id!r}: its scheduler is {' '.join([type(scheduler).__name__, *flags])}; "
                "takes a plain FlowMatchEulerDiscreteScheduler"
            )
        unit, limit = cls.size_rule(pipeline)
        for key in ("height", "width"):
            value = getattr(config.model, key)
            if value % unit or (limit is not None and value > limit):
                most = "" if limit is None else f" up to {limit}"
                raise UsageError(f"model.{key} = {value}: this model takes a multiple of {unit}{most}")

    @classmethod
    def size_rule(cls, pipeline: Any) -> tuple[int, int | None]:
        """Pixels that height and width are multiples of, and the most of them, if there is such a limit."""
        raise NotImplementedError

    @classmethod
    def latent_channels(cls, pipeline: Any) -> int:
        """C of a latent `[C, H, W]`."""
        raise NotImplementedError

    def blank_row(self) -> dict[str, Tensor]:
        """One row of zeros, shaped as `encode_prompt` gives it, without a text encoder."""
        raise NotImplementedError

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
        """See `FlowModel.encode_prompt`."""
        raise NotImplementedError

    def token_limits(self) -> list[TokenLimit]:
        """See `FlowModel.token_limits`."""
        raise NotImplementedError

    def velocity(self, network: Network, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `FlowModel.velocity`."""
        raise NotImplementedError

    def scheduled(self, steps: int, **arguments: Any) -> Grid:
        """The scheduler's grid of `steps` steps, as `set_timesteps(**arguments)` makes it.

        Raises:
            UsageError: it has none.
        """
        scheduler = self.pipeline.scheduler
        terminal = scheduler.config.get("shift_terminal")
        if terminal and steps == 1:
            raise UsageError(
                f"sampling.steps = 1: this model's scheduler stretches its grid to shift_terminal = {terminal}; "
                "takes 2 or more"
            )
        scheduler.set_timesteps(device="cpu", **arguments)
        return Grid(scheduler.sigmas.clone(), scheduler.timesteps.clone())

    def decode(self, latents: Tensor) -> Tensor:
        """See `FlowModel.decode`: the rule of an `AutoencoderKL`."""
        vae = self.pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return as_images(vae.decode(scaled, return_dict=False)[0])

    def guided(self, v: Tensor, v_uncond: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
        """See `FlowModel.guided`: here the plain rule, left to the step."""
        return v, v_uncond

    def without_adapter(self) -> AbstractContextManager[None]:
        """See `FlowModel.without_adapter`."""
        return adapters_off(self.network) if self._lora_scale is not None else nullcontext()

    def other_weights(self) -> Iterator[Tensor]:
        """See `FlowModel.other_weights`."""
        return self.pipeline.vae.parameters()  # type: ignore[no-any-return]

    def text_weights(self) -> Iterator[Tensor]:
        """See `FlowModel.text_weights`."""
        return (weight for encoder in _text_encoders(self.pipeline) for weight in encoder.parameters())

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `FlowModel.named_weights`."""
        for part, module in self.pipeline.components.items():
            if isinstance(module, nn.Module):
                yield from ((f"{part}.{name}", weight) for name, weight in module.named_parameters())

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See `FlowModel.trained_parameters`."""
        return trainable(self.network)

    def export(self, folder: Path, weights: dict[str, Tensor], style: ExportStyle = "diffusers") -> None:
        """A LoRA that `load_lora_weights` takes (alpha folded), or a pipeline folder after full training.

        Style comfyui writes the LoRA in the original model's names instead (`native_lora`); merged a pipeline folder
        with the LoRA added to its weights, and says what their dtype rounds away of it.

        Raises:
            UsageError: comfyui or merged after full training; comfyui of layers that it has no names for; merged of a
                run on quantised weights.
            CheckpointError: what was written does not give the same velocity when loaded back.
            NumericsError: a weight, trained or merged, is not finite.
        """
        if bad := first_bad(weights.items()):
            raise NumericsError(f"export: the trained weight {bad} is not finite")
        refuse_style(style, self.settings)
        if style == "merged" and self.packed_by:
            raise UsageError(
                f"export: style merged: the LoRA was trained on weights in {self.packed_by}, to which nothing can be "
                "added exactly; takes diffusers or comfyui"
            )
        whole = self._lora_scale is None or style == "merged"
        if whole and Path(self.pipeline.config._name_or_path).resolve() == folder.resolve():
            raise UsageError(f"export: {folder} is the base model itself; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        to = PipelineExport(self)
        # written and verified aside: a wrong export is never seen, and a folder of the user's is only added to
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as name:
            aside = Path(name) / "export"
            if self._lora_scale is None:
                exported = to.write_pipeline(aside, weights)
            else:
                folded = fold_alpha({_diffusers_name(n): w for n, w in weights.items()}, self._lora_scale)
                write = {"diffusers": to.write_lora, "comfyui": to.write_native, "merged": to.write_merged}
                exported = write[style](aside, folded)
            open_to_readers(aside)
            to.verify(exported, weights, folder)
            if folder.is_dir() and any(folder.iterdir()):
                shutil.copytree(aside, folder, dirs_exist_ok=True)
            else:
                os.replace(aside, folder)


def clip_limit(tokenizer: Any) -> TokenLimit:
    """Of a CLIP text encoder, which reads as many tokens as it has positions."""
    return TokenLimit("CLIP", int(tokenizer.model_max_length), partial(count_tokens, tokenizer))


def t5_limit(tokenizer: Any, most: int) -> TokenLimit:
    """Of a T5 encoder, which reads as many tokens as it is told to."""
    return TokenLimit("T5", most, partial(count_tokens, tokenizer), " (model.max_sequence_length)")


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, uncut."""
    return [len(ids) for ids in tokenizer(list(texts), truncation=False, padding=False).input_ids]


def as_images(decoded: Tensor) -> Tensor:
    """What a VAE's decoder gives, -1..1, as float32 images in 0..1; infinity, which would pass for white, as NaN."""
    images = decoded.float() / 2 + 0.5
    return torch.where(images.isfinite(), images.clamp(0, 1), torch.nan)


def _diffusers_name(name: str) -> str:
    return name.replace(f".{ADAPTER}.", ".")


def _text_encoders(pipeline: Any) -> list[nn.Module]:
    encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
    return [encoder for encoder in encoders if encoder is not None]
