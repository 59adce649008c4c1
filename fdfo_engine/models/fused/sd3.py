"""SD3's transformer (SD3, SD3.5-Medium with its second attention, SD3.5-Large) on the engine's fused ops."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor
from torch.nn.functional import silu

from fdfo_engine.models.fused.modulation import (
    Attended,
    Modulations,
    Residual,
    attend_and_feed,
    attention_outputs,
    modulation_of,
)
from fdfo_engine.models.fused.streams import Settings, StreamAttention
from fdfo_engine.ops import NormStream, gated_residual_norms

Rows = tuple[Tensor | None, Tensor | None]
Carried = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NOTHING: Carried = (None, None, None, None)


class FusedJointBlock:
    """The forward of a `JointTransformerBlock`; its weights stay in the block."""

    def __init__(self, block: Any, settings: Settings) -> None:
        self.block = block
        self.recompute = settings.recompute_fc1
        self.attention = StreamAttention(block.attn, settings)
        self.attention2 = None if block.attn2 is None else StreamAttention(block.attn2, settings)
        self.joints = self.attention.joints + (self.attention2.joints if self.attention2 else [])
        self.norms = (block.norm1, block.norm1_context)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulation: Rows = (None, None),
        carried: Carried | None = None,
    ) -> tuple[Any, ...]:
        """As the block's own; `modulation` are the rows of its norms, where the transformer has made them.

        With `carried`, the last gated outputs of image and text, their gates, or Nones before the first block, they are
        summed here, and this block's own are handed on: text, image, `carried`.
        """
        y, gate, text_y, text_gate = carried or NOTHING
        row, text_row = (modulation_of(norm, temb, made) for norm, made in zip(self.norms, modulation, strict=True))
        image, gates = self._image_norm(Residual(hidden_states, y, gate), row)
        text, text_gates = self._text_norm(Residual(encoder_hidden_states, text_y, text_gate), text_row)
        (x, *norms), (text_x, text_n) = gated_residual_norms([image, text])
        found, *found_text = self._attend(x, norms, gates, text_x, text_n, text_gates)
        if carried is None:
            return found_text[0].joined() if found_text else None, found.joined()
        last = found_text[0] if found_text else (None, None, None)
        return last[0], found.x, (*found[1:], *last[1:])

    def _image_norm(self, residual: Residual, row: Tensor) -> tuple[NormStream, list[Tensor]]:
        """The stream with the modulation of its norms, and the rest of its modulation."""
        if self.attention2 is None:
            shift, scale, *gates = row.chunk(6, 1)
            return residual.to_norm(scale, shift), gates
        shift, scale, gate, *feed, shift2, scale2, gate2 = row.chunk(9, 1)
        return residual.to_norm(scale, shift, scale2=scale2, shift2=shift2), [gate, *feed, gate2]

    def _text_norm(self, residual: Residual, row: Tensor) -> tuple[NormStream, list[Tensor]]:
        if self.block.context_pre_only:
            scale, shift = row.chunk(2, 1)
            return residual.to_norm(scale, shift), []
        shift, scale, *gates = row.chunk(6, 1)
        return residual.to_norm(scale, shift), gates

    def _attend(
        self, x: Tensor, norms: list[Tensor], gates: list[Tensor], text: Tensor, text_n: Tensor,
        text_gates: list[Tensor],
    ) -> list[Residual]:  # fmt: skip
        """The streams of image and, but for the last block, text."""
        block, (gate, *feed) = self.block, gates
        layers, streams = [block.attn.to_out[0]], [(x, gate)]
        if text_gates:
            layers, streams = [*layers, block.attn.to_add_out], [*streams, (text, text_gates[0])]
        image, *texts = attention_outputs(layers, self.attention(norms[0], text_n), streams)
        if self.attention2 is not None:
            second = self.attention2(norms[1])
            (image,) = attention_outputs([block.attn2.to_out[0]], second, [(image.joined(), feed.pop())])
        attended = [Attended(image, feed, block.ff)]
        attended += [Attended(text, text_gates[1:], block.ff_context) for text in texts]
        return attend_and_feed(attended, recompute=self.recompute)


class FusedSD3:
    """The forward of an `SD3Transformer2DModel` whose blocks are fused."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model = model
        self.blocks = [FusedJointBlock(block, settings) for block in model.transformer_blocks]
        norms = [norm for block in self.blocks for norm in block.norms]
        self.modulations = Modulations([*norms, model.norm_out], rehome=settings.rehome)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        block_controlnet_hidden_states: list[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """As diffusers' own; ControlNets, skipped layers and LoRA scales run through that, with fused blocks."""
        model = self.model
        if block_controlnet_hidden_states is not None or joint_attention_kwargs is not None or skip_layers is not None:
            output: Transformer2DModelOutput = type(model).forward(
                model, hidden_states, encoder_hidden_states, pooled_projections, timestep,
                block_controlnet_hidden_states, joint_attention_kwargs=joint_attention_kwargs,
                return_dict=return_dict, skip_layers=skip_layers,
            )  # fmt: skip
            return output
        height, width = (size // model.config.patch_size for size in hidden_states.shape[-2:])
        x = model.pos_embed(hidden_states).contiguous()  # the convolution puts channels before tokens
        temb = model.time_text_embed(timestep, pooled_projections)
        text = model.context_embedder(encoder_hidden_states)
        *rows, last = self.modulations(temb)
        carried = None if is_checkpointed(model) else NOTHING  # a checkpoint would keep what is carried, too
        for i, block in enumerate(model.transformer_blocks):
            found = run_block(model, block, x, text, temb, None, (rows[2 * i], rows[2 * i + 1]), carried)
            text, x, carried = found if len(found) == 3 else (*found, None)
        residual = Residual(x, *carried[:2]) if carried else Residual(x)
        sample = unpatchify(final_layer(model, residual, temb, last), height, width, model.config.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def is_checkpointed(model: Any) -> bool:
    """Whether the backward computes blocks again."""
    return bool(torch.is_grad_enabled() and model.gradient_checkpointing)


def run_block(model: Any, block: Any, *arguments: Any) -> Any:
    """`block(*arguments)`, checkpointed where the model says so."""
    if is_checkpointed(model):
        return model._gradient_checkpointing_func(block, *arguments)
    return block(*arguments)


def final_layer(model: Any, residual: Residual, temb: Tensor, row: Tensor | None) -> Tensor:
    """The last norm and projection, whose layers are called as modules: ZeRO-3 gathers them in the call."""
    scale, shift = (model.norm_out.linear(silu(temb)) if row is None else row).chunk(2, 1)
    out: Tensor = model.proj_out(gated_residual_norms([residual.to_norm(scale, shift)])[0][1])
    return out


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """`[B, height * width, patch * patch * C]` to `[B, C, height * patch, width * patch]`."""
    grid = tokens.unflatten(1, (height, width)).unflatten(3, (patch, patch, -1))
    image: Tensor = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return image
