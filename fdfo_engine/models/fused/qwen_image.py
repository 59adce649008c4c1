"""Qwen-Image's transformer on the engine's fused ops."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor
from torch.nn.functional import pad

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
    within_half,
)
from fdfo_engine.models.fused.joint_attention import JointAttention, Rotary, Settings
from fdfo_engine.models.fused.modulation import Modulations, Rows, modulations, rows_of
from fdfo_engine.ops import gated_residual_norms


class FusedQwenImageBlock:
    """The forward of a `QwenImageTransformerBlock`; its weights stay in the block."""

    def __init__(self, block: Any, settings: Settings) -> None:
        self.block = block
        self.recompute = settings.recompute_fc1
        self.attention = JointAttention(block.attn, settings, text_first=True, rotary=True)
        self.joints = self.attention.joints

    def modulation_layers(self) -> list[Any]:
        """Of the image's norms and of the text's."""
        return [self.block.img_mod[1], self.block.txt_mod[1]]

    def forward(
        self,
        hidden_states: Hidden,
        encoder_hidden_states: Hidden,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: list[int] | None = None,
        modulation: Rows | None = None,
    ) -> tuple[Hidden, Hidden]:
        """As the block's own; `modulation` and Residuals as in `FusedJointBlock`.

        With `modulation`, the rotary embedding is `rotary_tables`, and the mask is of all tokens, `joint_mask`.
        """
        block, (row, text_row) = self.block, rows_of(self, temb, modulation)
        (attn, ff), (text_attn, text_ff) = modulations(row, 2), modulations(text_row, 2)
        image, text = as_residual(hidden_states), as_residual(encoder_hidden_states)
        mask, rotary = encoder_hidden_states_mask, image_rotary_emb
        if modulation is None:
            mask, rotary = joint_mask(mask, image.x.shape[1]), rotary_tables(rotary)

        (x, n), (text_x, text_n) = gated_residual_norms([normed(image, attn), normed(text, text_attn)])
        mixed = self.attention(text_n, n, rotary=rotary, mask=mask)
        outs = [Out(block.attn.to_add_out, text_x, text_attn.gate), Out(block.attn.to_out[0], x, attn.gate)]
        text, image = into_residuals(mixed, outs)

        fed = [Fed(text, text_ff, block.txt_mlp), Fed(image, ff, block.img_mlp)]
        text, image = feed(fed, recompute=self.recompute)
        return within_half(like_input(text, encoder_hidden_states)), within_half(like_input(image, hidden_states))


class FusedQwenImage:
    """The forward of a `QwenImageTransformer2DModel` whose blocks are fused."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model = model
        self.blocks = [FusedQwenImageBlock(block, settings) for block in model.transformer_blocks]
        self.modulations = Modulations(self.blocks, model.norm_out, rehome=settings.rehome)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        img_shapes: list[tuple[int, int, int]] | None = None,
        guidance: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """As diffusers' own; ControlNets, LoRA scales and further conditions run through that, with fused blocks."""
        model = self.model
        unusual = guidance, attention_kwargs, controlnet_block_samples, additional_t_cond
        if any(given is not None for given in unusual):
            output: Transformer2DModelOutput = type(model).forward(
                model, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, img_shapes, guidance,
                attention_kwargs=attention_kwargs, controlnet_block_samples=controlnet_block_samples,
                additional_t_cond=additional_t_cond, return_dict=return_dict,
            )  # fmt: skip
            return output
        image = model.img_in(hidden_states)
        prompt = model.txt_in(model.txt_norm(encoder_hidden_states))
        assert timestep is not None
        temb = model.time_text_embed(timestep.to(image.dtype), image)
        positions = model.pos_embed(img_shapes, max_txt_seq_len=prompt.shape[1], device=image.device)
        rotary, mask = rotary_tables(positions), joint_mask(encoder_hidden_states_mask, image.shape[1])

        rows, last = self.modulations(temb)
        x, text = between_blocks(model, image, prompt, clips_half=True)
        for block, of_block in zip(model.transformer_blocks, rows, strict=True):
            text, x = run_block(model, block, x, text, mask, temb, rotary, None, None, of_block)
        sample = final_layer(model, x, temb, last)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def rotary_tables(positions: tuple[Tensor, Tensor] | None) -> Rotary | None:
    """Cosines and sines `[S, E]`, each twice, of complex embeddings `[S_i, E / 2]` of image and text; text first."""
    if positions is None:
        return None
    image, text = positions
    both = torch.view_as_real(torch.cat([text, image])).repeat_interleave(2, 1)
    cos, sin = both.unbind(2)
    return cos.contiguous(), sin.contiguous()


def joint_mask(text_mask: Tensor | None, image_tokens: int) -> Tensor | None:
    """Whether each token `[B, S]` is attended to: text where its mask says so, then the whole image."""
    return None if text_mask is None else pad(text_mask.bool(), (0, image_tokens), value=True)
