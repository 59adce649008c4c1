"""The transformers that are measured, by name: configs, token counts, random weights and inputs; nothing is fetched."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from fdfo_engine.config import load_config
from fdfo_engine.models.lora import ATTENTION_PROJECTIONS, add_lora, trainable
from fdfo_engine.shapes.pipeline import PROMPT_TOKENS, shapes_base

_SD35: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
}  # fmt: skip
CLIP_TOKENS = 77
"""What SD3's CLIP encoders give of every prompt, before T5's tokens."""

_MEDIUM = _SD35 | {"num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}


@dataclass(frozen=True)
class Architecture:
    """A transformer of `config` on a latent of `side` x `side` and `text_tokens` tokens, adapted at `rank`.

    `rollout_batch` and `train_batch`: images in one forward of the rollout, items in one micro-batch.
    """

    kind: type[nn.Module]
    config: dict[str, Any]
    side: int
    text_tokens: int
    rollout_batch: int = 24
    train_batch: int = 24
    rank: int = 32
    blocks: tuple[str, ...] = field(default=("transformer_blocks",))

    @cached_property
    def is_flux(self) -> bool:
        """FLUX takes packed tokens, and their positions."""
        return self.kind is FluxTransformer2DModel

    @property
    def image_tokens(self) -> int:
        """Tokens of the image; of FLUX, whose pixels come packed, at `side` / 2."""
        return (self.side // 2) ** 2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, H, W of one image's latent."""
        channels = self.config["in_channels"]
        return channels // 4 if self.is_flux else channels, self.side, self.side

    def network(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        """The network with its adapter, frozen but for it: every matrix random, rounded to bfloat16.

        Frozen weights and buffers are of `dtype`, the adapter of float32.
        """
        with device:
            network = self.kind(**self.config)
        network.eval().requires_grad_(False)
        if isinstance(network, SD3Transformer2DModel | FluxTransformer2DModel):
            add_lora(network, rank=self.rank, alpha=2.0 * self.rank, targets=ATTENTION_PROJECTIONS, seed=0)
        _fill(network, torch.Generator(device).manual_seed(0))
        cast_frozen(network, dtype)
        return network

    def inputs(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Random arguments of one forward of `batch` images."""
        generator = torch.Generator(device).manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        sigmas = torch.linspace(0.95, 0.05, batch, device=device)
        text = {
            "encoder_hidden_states": normal(batch, self.text_tokens, self.config["joint_attention_dim"]),
            "pooled_projections": normal(batch, self.config["pooled_projection_dim"]),
            "return_dict": False,
        }
        if not self.is_flux:
            x = normal(batch, self.config["in_channels"], self.side, self.side)
            return {"hidden_states": x, "timestep": 1000 * sigmas, **text}
        rows = torch.arange(self.side // 2, device=device, dtype=torch.float32)
        grid = torch.cartesian_prod(rows, rows)
        return {
            "hidden_states": normal(batch, self.image_tokens, self.config["in_channels"]),
            "timestep": sigmas,
            "guidance": torch.full((batch,), 3.5, device=device),
            "img_ids": torch.cat([torch.zeros_like(grid[:, :1]), grid], 1),
            "txt_ids": torch.zeros(self.text_tokens, 3, device=device),
            **text,
        }


def t5_tokens(config: str) -> int:
    """T5 tokens of a prompt that the shipped `config` trains with."""
    return load_config(config).model.max_sequence_length


def architectures() -> dict[str, Architecture]:
    """All by name, with as many text tokens as the shipped configs train with.

    At 512 x 512 pixels but for `shapes`, which makes 64 x 64, and `blocks`, for CPUs.
    """
    shapes = json.loads((shapes_base() / "transformer" / "config.json").read_text())
    shapes = {key: value for key, value in shapes.items() if not key.startswith("_")}
    return {
        "shapes": Architecture(SD3Transformer2DModel, shapes, side=16, text_tokens=PROMPT_TOKENS, rank=8),
        "blocks": Architecture(
            SD3Transformer2DModel, _MEDIUM | {"num_layers": 2, "dual_attention_layers": (0,)},
            side=32, text_tokens=64, rollout_batch=2, train_batch=2,
        ),
        "sd35-medium": Architecture(
            SD3Transformer2DModel, _MEDIUM | {"num_layers": 24, "dual_attention_layers": tuple(range(13))},
            side=64, text_tokens=CLIP_TOKENS + t5_tokens("sd35m_pickscore"),
        ),
        "sd35-large": Architecture(
            SD3Transformer2DModel,
            _SD35 | {
                "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192
            },
            side=64, text_tokens=CLIP_TOKENS + t5_tokens("sd35l"), train_batch=12,
        ),
        "flux1-dev": Architecture(
            FluxTransformer2DModel,
            {
                "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
                "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
                "guidance_embeds": True,
            },
            side=64, text_tokens=t5_tokens("flux1_dev"), rollout_batch=12, train_batch=6,
            blocks=("transformer_blocks", "single_transformer_blocks"),
        ),
    }  # fmt: skip


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Gives frozen weights and buffers another dtype."""
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for buffer in network.buffers():
        buffer.data = buffer.data.to(dtype)


def sharing(network: Any) -> Any:
    """A copy with an adapter of its own on the same frozen weights, so that several candidates fit a GPU."""
    frozen: dict[int, Any] = {id(p): p for p in network.parameters() if not p.requires_grad}
    return copy.deepcopy(network, memo=frozen)


@torch.no_grad()
def _fill(network: nn.Module, generator: torch.Generator) -> None:
    # fresh modules start with zeroed modulation and a zero B, where whole branches and half of the gradients vanish
    adapter = {id(p) for _, p in trainable(network)}
    for parameter in network.parameters():
        if parameter.ndim > 1:
            spread = (0.3 if id(parameter) in adapter else 1.0) / parameter[0].numel() ** 0.5
            parameter.normal_(0.0, spread, generator=generator)
        parameter.copy_(parameter.bfloat16())
