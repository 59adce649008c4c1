"""Stable Diffusion 3 and 3.5, and the bundled miniature, over diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from fdfo_engine.models.flow_model import Conditioning, Grid, Network, TokenLimit
from fdfo_engine.models.pipeline_model import PipelineModel, clip_limit, t5_limit
from fdfo_engine.ops import moved


class SD3Model(PipelineModel):
    """The `FlowModel` of SD3, SD3.5-M, SD3.5-L and every pipeline of their shape."""

    family = "sd3"
    pipeline_class = StableDiffusion3Pipeline
    optional_parts = ("text_encoder_3", "tokenizer_3")
    native_layers = {  # noqa: RUF012 - never written to
        "joint_blocks.{}.x_block.attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
        "joint_blocks.{}.x_block.attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
        "joint_blocks.{}.context_block.attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{p}_proj" for p in "qkv"),
        "joint_blocks.{}.context_block.attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
        "joint_blocks.{}.x_block.attn2.qkv": tuple(f"transformer_blocks.{{}}.attn2.to_{part}" for part in "qkv"),
        "joint_blocks.{}.x_block.attn2.proj": ("transformer_blocks.{}.attn2.to_out.0",),
    }

    @classmethod
    def size_rule(cls, pipeline: Any) -> tuple[int, int]:
        """See `PipelineModel.size_rule`: patches, and the table of their positions."""
        unit: int = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
        return unit, pipeline.transformer.config.pos_embed_max_size * unit

    @classmethod
    def latent_channels(cls, pipeline: Any) -> int:
        """See `PipelineModel.latent_channels`."""
        return int(pipeline.transformer.config.in_channels)

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
        return self.scheduled(steps, num_inference_steps=steps, **kwargs)

    def encode_prompt(self, prompt: str) -> Conditioning:
        """Joint text tokens and pooled vector, as the pipeline makes them."""
        with self.text_encoders():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=prompt,
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.settings.max_sequence_length,
            )
        return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def token_limits(self) -> list[TokenLimit]:
        """See `FlowModel.token_limits`: both CLIPs read alike; T5 may be left out."""
        limits = [clip_limit(self.pipeline.tokenizer)]
        if self.pipeline.tokenizer_3 is not None and self.settings.max_sequence_length:
            limits.append(t5_limit(self.pipeline.tokenizer_3, self.settings.max_sequence_length))
        return limits

    def blank_row(self) -> dict[str, Tensor]:
        """See `PipelineModel.blank_row`."""
        config, settings = self.network.config, self.settings
        tokens = self.pipeline.tokenizer_max_length + settings.max_sequence_length  # CLIP's, then T5's
        return {
            "encoder_hidden_states": torch.zeros(1, tokens, config.joint_attention_dim, dtype=self.dtype),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim, dtype=self.dtype),
        }

    def velocity(self, network: Network, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `FlowModel.velocity`; the network is told `1000 * sigma`."""
        return network(
            hidden_states=latents.to(self.dtype),
            timestep=moved(timesteps, latents.device),
            return_dict=False,
            **conditioning.tensors,
        )[0]
