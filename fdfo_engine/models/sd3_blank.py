"""The transformer and the VAE of an SD3 pipeline from their configs alone: their sizes, without weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer

from fdfo_engine.config import ModelConfig
from fdfo_engine.runtime.errors import EnvironmentProblem


def blank_pipeline(model_id: str, settings: ModelConfig) -> Any:
    """What stands in for a pipeline: both on the meta device in `settings.dtype`, and no text encoder.

    Raises:
        EnvironmentProblem: the configs are neither in a folder nor to be had from the hub.
    """
    transformer = _blank(SD3Transformer2DModel, model_id, "transformer", settings)
    vae = _blank(AutoencoderKL, model_id, "vae", settings)
    return SimpleNamespace(
        transformer=transformer,
        vae=vae,
        vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
    )


def blank_conditioning(model_id: str, settings: ModelConfig, transformer: Any) -> dict[str, Tensor]:
    """One row as the text encoders would give it; `transformer` is that network's config."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id, subfolder="tokenizer", revision=settings.revision)
    except (OSError, ValueError) as error:
        raise _absent(model_id, error) from error
    tokens = tokenizer.model_max_length + settings.max_sequence_length  # CLIP's, then T5's
    dtype = getattr(torch, settings.dtype)
    return {
        "encoder_hidden_states": torch.zeros(1, tokens, transformer.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.zeros(1, transformer.pooled_projection_dim, dtype=dtype),
    }


def become_fake(network: nn.Module) -> None:
    """Replaces meta weights by fake ones on the CPU, of the fake mode in force: attention counts as it runs."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _blank(kind: Any, model_id: str, part: str, settings: ModelConfig) -> Any:
    try:
        config = kind.load_config(model_id, subfolder=part, revision=settings.revision)
    except OSError as error:
        raise _absent(model_id, error) from error
    with torch.device("meta"):
        return nn.Module.to(kind.from_config(config), getattr(torch, settings.dtype))


def _absent(model_id: str, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(f"model.id = {model_id!r}: {str(error).splitlines()[0]}")
