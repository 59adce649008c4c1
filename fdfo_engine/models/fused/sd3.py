"""SD3's transformer (SD3, SD3.5-Medium with its second attention, SD3.5-Large) on the engine's fused ops."""

from __future__ import annotations

from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from fdfo_engine.models.fused.blocks import (
    Fed,
    Hidden,
    Out,
    as_residual,
    between_blocks,
    feed,
    final_layer,
    into_residuals,
    like_input,
    normed,
    run_block,
)
from fdfo_engine.models.fused.joint_attention import JointAttention, Settings
from fdfo_engine.models.fused.modulation import Modulation, Modulations, Rows, modulations, rows_of
from fdfo_engine.ops import gated_residual_norms


class FusedJointBlock:
    """The forward of a `JointTransformerBlock`; its weights stay in the block."""

    def __init__(self, block: Any, settings: Settings) -> None:
        self.block = block
        self.recompute = settings.recompute_fc1
        self.attention = JointAttention(block.attn, settings)
        self.attention2 = None if block.attn2 is None else JointAttention(block.attn2, settings)
        self.joints = self.attention.joints + (self.attention2.joints if self.attention2 else [])

    def modulation_layers(self) -> list[Any]:
        """Of the image's norms and of the text's."""
        return [self.block.norm1.linear, self.block.norm1_context.linear]

    def forward(
        self,
        hidden_states: Hidden,
        encoder_hidden_states: Hidden,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulation: Rows | None = None,
    ) -> tuple[Hidden | None, Hidden]:
        """As the block's own; `modulation` are its rows, where the transformer has made them.

        A fused transformer hands on Residuals in the place of tensors, and gets such back.
        """
        block, (row, text_row) = self.block, rows_of(self, temb, modulation)
        attn, ff, *attn2 = modulations(row, 2 if self.attention2 is None else 3)
        text_attn, *text_ff = self._text_modulations(text_row)
        image, text = as_residual(hidden_states), as_residual(encoder_hidden_states)

        (x, n, *n2), (text_x, text_n) = gated_residual_norms([normed(image, attn, *attn2), normed(text, text_attn)])
        outs = [Out(block.attn.to_out[0], x, attn.gate)]
        if not block.context_pre_only:
            outs.append(Out(block.attn.to_add_out, text_x, text_attn.gate))
        image, *texts = into_residuals(self.attention(n, text_n), outs)
        if self.attention2 is not None:
            (second,) = attn2
            mixed = self.attention2(*n2)
            (image,) = into_residuals(mixed, [Out(block.attn2.to_out[0], image.joined(), second.gate)])

        fed = [Fed(image, ff, block.ff)]
        fed += [Fed(text, m, block.ff_context) for text, m in zip(texts, text_ff, strict=True)]
        image, *texts = feed(fed, recompute=self.recompute)
        return like_input(texts[0], encoder_hidden_states) if texts else None, like_input(image, hidden_states)

    def _text_modulations(self, row: Tensor) -> list[Modulation]:
        """Of the text's norms; the last block drops the text after its attention, and has one without a gate."""
        if not self.block.context_pre_only:
            return modulations(row, 2)
        scale, shift = row.chunk(2, 1)
        return [Modulation(shift, scale)]


class FusedSD3:
    """The forward of an `SD3Transformer2DModel` whose blocks are fused."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model = model
        self.blocks = [FusedJointBlock(block, settings) for block in model.transformer_blocks]
        self.modulations = Modulations(self.blocks, model.norm_out, rehome=settings.rehome)

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
        image = model.pos_embed(hidden_states).contiguous()  # the convolution puts channels before tokens
        temb = model.time_text_embed(timestep, pooled_projections)
        prompt = model.context_embedder(encoder_hidden_states)

        rows, last = self.modulations(temb)
        x, text = between_blocks(model, image, prompt)
        for block, of_block in zip(model.transformer_blocks, rows, strict=True):
            text, x = run_block(model, block, x, text, temb, None, of_block)
        sample = unpatchify(final_layer(model, x, temb, last), height, width, model.config.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """`[B, height * width, patch * patch * C]` to `[B, C, height * patch, width * patch]`."""
    grid = tokens.unflatten(1, (height, width)).unflatten(3, (patch, patch, -1))
    image: Tensor = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return image
