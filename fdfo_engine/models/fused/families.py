"""The transformers that have fused forwards, and what these know of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)

from fdfo_engine.models.fused.flux import FusedFlux
from fdfo_engine.models.fused.qwen_image import FusedQwenImage
from fdfo_engine.models.fused.sd3 import FusedSD3


class Family(NamedTuple):
    """A class of transformers."""

    transformer: type
    fused: Any
    """Made of a transformer and its Settings; has `forward`, `blocks` and `modulations`."""
    blocks: tuple[type, ...]
    processor: type
    """Of attention, the one that the fused blocks stand for."""
    feed_forwards: tuple[str, ...] = ("ff", "ff_context")
    """Names of a block's feed-forwards."""
    masks_text: bool = False
    """Whether prompts are padded, so that attention takes a mask."""
    attention_arguments: str = "joint_attention_kwargs"
    """A block's argument with arguments of its attention: calls that fill it go to diffusers' own forward."""


FAMILIES = (
    Family(SD3Transformer2DModel, FusedSD3, (JointTransformerBlock,), JointAttnProcessor2_0),
    Family(
        FluxTransformer2DModel, FusedFlux, (FluxTransformerBlock, FluxSingleTransformerBlock), FluxAttnProcessor,
    ),
    Family(
        QwenImageTransformer2DModel, FusedQwenImage, (QwenImageTransformerBlock,), QwenDoubleStreamAttnProcessor2_0,
        feed_forwards=("img_mlp", "txt_mlp"), masks_text=True,
    ),
)  # fmt: skip


def family_of(transformer: Any) -> Family | None:
    """The family of a transformer, or None where it has none: a subclass may compute something else."""
    for family in FAMILIES:
        if type(transformer) is family.transformer:
            return family
    return None
