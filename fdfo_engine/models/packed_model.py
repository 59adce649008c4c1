"""Families whose network sees latents in 2 x 2 patches, at the network's door only: FLUX.1 and Qwen-Image."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from fdfo_engine.config import Config
from fdfo_engine.models.flow_model import Conditioning, Grid, Network
from fdfo_engine.models.pipeline_model import PipelineModel
from fdfo_engine.ops import moved
from fdfo_engine.runtime.errors import UsageError


class PackedModel(PipelineModel):
    """A family defines `inputs` instead of `velocity`; sizes and the grid are the same for all of them."""

    @classmethod
    def size_rule(cls, pipeline: Any) -> tuple[int, int | None]:
        """See `PipelineModel.size_rule`: rotary positions set no limit."""
        return 2 * pipeline.vae_scale_factor, None

    @classmethod
    def latent_channels(cls, pipeline: Any) -> int:
        """See `PipelineModel.latent_channels`."""
        return int(pipeline.transformer.config.in_channels) // 4

    @classmethod
    def refuse_settings(cls, config: Config) -> None:
        """See `PipelineModel.refuse_settings`."""
        super().refuse_settings(config)
        if config.model.max_sequence_length == 0:
            raise UsageError(f"model.max_sequence_length = 0: the {cls.family} family's prompt is these tokens")

    @classmethod
    def refuse_pipeline(cls, pipeline: Any, config: Config) -> None:
        """See `PipelineModel.refuse_pipeline`; also a transformer that wants more than a latent."""
        vae = pipeline.vae.config
        channels = next(vae[key] for key in ("latent_channels", "z_dim") if key in vae)
        if cls.latent_channels(pipeline) != channels:
            raise UsageError(
                f"model.id = {config.model.id!r}: its transformer takes {pipeline.transformer.config.in_channels} "
                f"channels and its latents packed have {4 * channels}: it wants an image beside the prompt"
            )
        super().refuse_pipeline(pipeline, config)

    def grid(self, steps: int) -> Grid:
        """The grid of the family's pipeline: its own sigmas, shifted by the scheduler as its number of tokens asks."""
        _, height, width = self.latent_shape
        get = self.pipeline.scheduler.config.get
        mu = calculate_shift(
            (height // 2) * (width // 2), get("base_image_seq_len", 256), get("max_image_seq_len", 4096),
            get("base_shift", 0.5), get("max_shift", 1.15),
        )  # fmt: skip
        return self.scheduled(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    def inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        """What the network takes besides tokens and times, for these rows."""
        raise NotImplementedError

    def velocity(self, network: Network, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `FlowModel.velocity`; the network is told sigma, rounded as its pipeline rounds it."""
        tokens = network(
            hidden_states=pack(latents.to(self.dtype)),
            timestep=moved(timesteps, latents.device).to(self.dtype) / 1000,
            return_dict=False,
            **self.inputs(conditioning),
        )[0]
        return unpack(tokens, latents.shape[2], latents.shape[3])


def pack(latents: Tensor) -> Tensor:
    """`[N, C, H, W]` to tokens `[N, H/2 * W/2, 4C]`, each a patch: channel, row, column."""
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # N C h 2 w 2
    tokens: Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return tokens


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The latents `[N, C, height, width]` of what `pack` gives."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))  # N h w C 2 2
    latents: Tensor = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return latents
