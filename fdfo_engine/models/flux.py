"""FLUX.1-dev and -schnell, and fine-tunes of their shape, over diffusers' own pipeline."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from fdfo_engine.config import Config
from fdfo_engine.models.flow_model import Conditioning, TokenLimit
from fdfo_engine.models.packed_model import PackedModel
from fdfo_engine.models.pipeline_model import clip_limit, t5_limit
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import UsageError

DEFAULT_EMBEDDED_GUIDANCE = 3.5
"""What `FluxPipeline` tells a guidance-distilled model unless asked for something else."""


class FluxModel(PackedModel):
    """The `FlowModel` of FLUX.1.

    A model with `guidance_embeds` (dev) is told `sampling.embedded_guidance`, 3.5 by default; schnell takes none.
    `sampling.guidance_scale` is the pipeline's `true_cfg_scale` with `model.negative_prompt`, on top of that.
    """

    family = "flux"
    pipeline_class = FluxPipeline
    takes_embedded_guidance = True
    native_layers = {  # noqa: RUF012 - never written to
        "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
        "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
        "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv"),
        "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
        "single_blocks.{}.linear1": (
            *(f"single_transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
            "single_transformer_blocks.{}.proj_mlp",
        ),
        "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    }

    def __init__(self, pipeline: Any, config: Config, device: torch.device) -> None:
        super().__init__(pipeline, config, device)
        self._embedded_guidance: float | None = None
        if self.network.config.guidance_embeds:
            self._embedded_guidance = config.sampling.embedded_guidance
            if self._embedded_guidance is None:
                self._embedded_guidance = DEFAULT_EMBEDDED_GUIDANCE
                say(f"sampling.embedded_guidance: {DEFAULT_EMBEDDED_GUIDANCE}, the pipeline's own default")

    @classmethod
    def refuse_pipeline(cls, pipeline: Any, config: Config) -> None:
        """See `PipelineModel.refuse_pipeline`; also embedded guidance for schnell."""
        super().refuse_pipeline(pipeline, config)
        if pipeline.transformer.config.guidance_embeds:
            return
        if config.sampling.embedded_guidance is not None:
            raise UsageError(
                f"sampling.embedded_guidance = {config.sampling.embedded_guidance}: this model has no such input "
                "(guidance_embeds is false); set it to null, and sampling.guidance_scale for guidance"
            )

    def encode_prompt(self, prompt: str) -> Conditioning:
        """T5's tokens and CLIP's pooled vector, as the pipeline makes them."""
        with self.text_encoders():
            embeds, pooled, _ = self.pipeline.encode_prompt(
                prompt=prompt, device=self.device, max_sequence_length=self.settings.max_sequence_length
            )
        return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def token_limits(self) -> list[TokenLimit]:
        """See `FlowModel.token_limits`."""
        return [
            clip_limit(self.pipeline.tokenizer),
            t5_limit(self.pipeline.tokenizer_2, self.settings.max_sequence_length),
        ]

    def blank_row(self) -> dict[str, Tensor]:
        """See `PipelineModel.blank_row`."""
        config, tokens = self.network.config, self.settings.max_sequence_length
        return {
            "encoder_hidden_states": torch.zeros(1, tokens, config.joint_attention_dim, dtype=self.dtype),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim, dtype=self.dtype),
        }

    def inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        """See `PackedModel.inputs`: rotary positions, and the embedded guidance where the model takes it."""
        text = conditioning.tensors["encoder_hidden_states"]
        guidance = None
        if self._embedded_guidance is not None:
            guidance = torch.full((len(text),), self._embedded_guidance, device=text.device)
        return {
            "guidance": guidance,
            "img_ids": self._img_ids,
            "txt_ids": text.new_zeros(text.shape[1], 3),
            **conditioning.tensors,
        }

    @cached_property
    def _img_ids(self) -> Tensor:
        _, height, width = self.latent_shape
        ids: Tensor = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, self.device, self.dtype)
        return ids
