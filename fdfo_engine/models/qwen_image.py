"""Qwen-Image over diffusers' own pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor
from torch.nn.functional import pad

from fdfo_engine.config import Config
from fdfo_engine.models.flow_model import Conditioning, TokenLimit
from fdfo_engine.models.packed_model import PackedModel, pack, unpack
from fdfo_engine.models.pipeline_model import as_images, count_tokens
from fdfo_engine.ops import moved
from fdfo_engine.runtime.errors import UsageError

_OTHER_INPUTS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Settings of its transformer that only edit, layered or distilled variants turn on."""


class QwenImageModel(PackedModel):
    """The `FlowModel` of Qwen-Image.

    Prompts have as many tokens as they need; rows are padded to `model.max_sequence_length` and masked, so that any
    can share a batch: attention never sees the padding.
    """

    family = "qwen_image"
    pipeline_class = QwenImagePipeline

    @classmethod
    def refuse_pipeline(cls, pipeline: Any, config: Config) -> None:
        """See `PipelineModel.refuse_pipeline`; also transformers that want more than a prompt."""
        on = [key for key in _OTHER_INPUTS if pipeline.transformer.config.get(key)]
        if on:
            raise UsageError(
                f"model.id = {config.model.id!r}: {', '.join(on)} of its transformer: it takes more than a prompt, "
                "as models that edit images or layers do"
            )
        super().refuse_pipeline(pipeline, config)

    def encode_prompt(self, prompt: str) -> Conditioning:
        """The text encoder's last hidden states behind the template's prefix, as the pipeline makes them, padded."""
        length = self.settings.max_sequence_length
        with self.text_encoders():
            embeds, _ = self.pipeline.encode_prompt(
                prompt=prompt, device=self.device, max_sequence_length=length
            )  # one prompt has no padding: its mask is None
        tokens = embeds.shape[1]
        mask = torch.arange(length, device=embeds.device)[None] < tokens
        return Conditioning(
            {
                "encoder_hidden_states": pad(embeds, (0, 0, 0, length - tokens)),
                "encoder_hidden_states_mask": mask,
            }
        )

    def token_limits(self) -> list[TokenLimit]:
        """See `FlowModel.token_limits`: what stands behind the template's prefix, which the pipeline drops."""
        template, dropped = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx

        def count(prompts: Sequence[str]) -> list[int]:
            whole = count_tokens(self.pipeline.tokenizer, [template.format(prompt) for prompt in prompts])
            return [tokens - dropped for tokens in whole]

        return [
            TokenLimit("its text encoder", self.settings.max_sequence_length, count, " (model.max_sequence_length)")
        ]

    def blank_row(self) -> dict[str, Tensor]:
        """See `PipelineModel.blank_row`."""
        width, tokens = self.network.config.joint_attention_dim, self.settings.max_sequence_length
        return {
            "encoder_hidden_states": torch.zeros(1, tokens, width, dtype=self.dtype),
            "encoder_hidden_states_mask": torch.ones(1, tokens, dtype=torch.bool),
        }

    def inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        """See `PackedModel.inputs`: frames, rows and columns of the rotary positions, one image for all rows."""
        _, height, width = self.latent_shape
        return {"img_shapes": (1, height // 2, width // 2), **conditioning.tensors}

    def guided(self, v: Tensor, v_uncond: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
        """The plain rule, then each token scaled to the norm that it has with the prompt: `QwenImagePipeline`'s."""
        positive, negative = pack(v.float()), pack(v_uncond.float())
        combined = negative + guidance_scale * (positive - negative)
        scaled = combined * (positive.norm(dim=2, keepdim=True) / combined.norm(dim=2, keepdim=True))
        return unpack(scaled, v.shape[2], v.shape[3]).to(v.dtype), None

    def decode(self, latents: Tensor) -> Tensor:
        """See `FlowModel.decode`: each channel has its own mean and deviation, and the VAE an axis of frames."""
        vae, scaled = self.pipeline.vae, latents.to(self.pipeline.vae.dtype)
        std, mean = (
            moved(torch.tensor(values, dtype=scaled.dtype), scaled.device)[:, None, None]
            for values in (vae.config.latents_std, vae.config.latents_mean)
        )
        return as_images(vae.decode((scaled * std + mean)[:, :, None], return_dict=False)[0][:, :, 0])
