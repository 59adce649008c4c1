"""FLUX's transformer on the engine's fused ops."""

from __future__ import annotations

from typing import Any

import torch
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
    gelu_of,
    into_residuals,
    last_tokens,
    like_input,
    normed,
    run_block,
    within_half,
)
from fdfo_engine.models.fused.joint_attention import JointAttention, Rotary, Settings
from fdfo_engine.models.fused.linear import projection_of
from fdfo_engine.models.fused.modulation import Modulations, Rows, modulations, rows_of
from fdfo_engine.ops import Residual, feed_forward, gated_residual_norms


class FusedDoubleBlock:
    """The forward of a `FluxTransformerBlock`; its weights stay in the block."""

    def __init__(self, block: Any, settings: Settings) -> None:
        self.block = block
        self.recompute = settings.recompute_fc1
        self.attention = JointAttention(block.attn, settings, text_first=True, rotary=True)
        self.joints = self.attention.joints

    def modulation_layers(self) -> list[Any]:
        """Of the image's norms and of the text's."""
        return [self.block.norm1.linear, self.block.norm1_context.linear]

    def forward(
        self,
        hidden_states: Hidden,
        encoder_hidden_states: Hidden,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulation: Rows | None = None,
    ) -> tuple[Hidden, Hidden]:
        """As the block's own; `modulation` and Residuals as in `FusedJointBlock`."""
        block, (row, text_row) = self.block, rows_of(self, temb, modulation)
        (attn, ff), (text_attn, text_ff) = modulations(row, 2), modulations(text_row, 2)
        image, text = as_residual(hidden_states), as_residual(encoder_hidden_states)

        (x, n), (text_x, text_n) = gated_residual_norms([normed(image, attn), normed(text, text_attn)])
        mixed = self.attention(text_n, n, rotary=image_rotary_emb)
        outs = [Out(block.attn.to_add_out, text_x, text_attn.gate), Out(block.attn.to_out[0], x, attn.gate)]
        text, image = into_residuals(mixed, outs)

        fed = [Fed(text, text_ff, block.ff_context), Fed(image, ff, block.ff)]
        text, image = feed(fed, recompute=self.recompute)
        return within_half(like_input(text, encoder_hidden_states)), like_input(image, hidden_states)


class FusedSingleBlock:
    """The forward of a `FluxSingleTransformerBlock`; its weights stay in the block."""

    def __init__(self, block: Any, settings: Settings) -> None:
        self.block = block
        self.recompute = settings.recompute_fc1
        self.attention = JointAttention(block.attn, settings, rotary=True)
        self.joints = self.attention.joints

    def modulation_layers(self) -> list[Any]:
        """Of its one norm."""
        return [self.block.norm.linear]

    def forward(
        self,
        hidden_states: Hidden,
        encoder_hidden_states: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulation: Rows | None = None,
    ) -> tuple[Tensor | None, Hidden]:
        """As the block's own. Without `encoder_hidden_states`, `hidden_states` are text and image tokens, joined."""
        (row,) = rows_of(self, temb, modulation)
        (both,) = modulations(row, 1)
        text, tokens = encoder_hidden_states, hidden_states
        if text is not None:
            tokens = torch.cat([text, as_residual(hidden_states).joined()], 1)

        ((x, n),) = gated_residual_norms([normed(as_residual(tokens), both)])
        mixed = self.attention(n, rotary=image_rotary_emb)
        found = within_half(like_input(self._out(n, mixed, x, both.gate), tokens))

        if text is None or isinstance(found, Residual):
            return None, found
        return found[:, : text.shape[1]], found[:, text.shape[1] :]

    def _out(self, n: Tensor, mixed: Tensor, x: Tensor, gate: Tensor | None) -> Residual:
        """`proj_out` of attention and feed-forward side by side: without adapters the sum of two products."""
        up, down = projection_of(self.block.proj_mlp), projection_of(self.block.proj_out)
        if up.adapter is not None or down.adapter is not None:
            side_by_side = torch.cat([mixed, gelu_of(self.block.proj_mlp, n)], 2)
            return into_residuals(side_by_side, [Out(self.block.proj_out, x, gate)])[0]
        y = feed_forward(
            n, up.weight, up.bias, down.weight, down.bias, beside=mixed, recompute=self.recompute
        )  # fmt: skip
        return Residual(x, y, gate)


class FusedFlux:
    """The forward of a `FluxTransformer2DModel` whose blocks are fused."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model = model
        double = [FusedDoubleBlock(block, settings) for block in model.transformer_blocks]
        single = [FusedSingleBlock(block, settings) for block in model.single_transformer_blocks]
        self.blocks: list[FusedDoubleBlock | FusedSingleBlock] = [*double, *single]
        self.modulations = Modulations(self.blocks, model.norm_out, rehome=settings.rehome)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """As diffusers' own; ControlNets and LoRA scales run through that, with fused blocks."""
        model = self.model
        unusual = joint_attention_kwargs, controlnet_block_samples, controlnet_single_block_samples
        if any(given is not None for given in unusual):
            output: Transformer2DModelOutput = type(model).forward(
                model, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance,
                joint_attention_kwargs=joint_attention_kwargs, controlnet_block_samples=controlnet_block_samples,
                controlnet_single_block_samples=controlnet_single_block_samples, return_dict=return_dict,
                controlnet_blocks_repeat=controlnet_blocks_repeat,
            )  # fmt: skip
            return output
        image, prompt = model.x_embedder(hidden_states), model.context_embedder(encoder_hidden_states)
        told = [1000 * t.to(image.dtype) for t in (timestep, guidance) if t is not None]
        temb = model.time_text_embed(*told, pooled_projections)
        rotary = model.pos_embed(torch.cat([unbatched(txt_ids), unbatched(img_ids)]))

        rows, last = self.modulations(temb)
        of_block = iter(rows)
        x, text = between_blocks(model, image, prompt, clips_half=True)
        for block in model.transformer_blocks:
            text, x = run_block(model, block, x, text, temb, rotary, None, next(of_block))
        joined = torch.cat([as_residual(text).joined(), as_residual(x).joined()], 1)
        (tokens,) = between_blocks(model, joined, clips_half=True)
        for block in model.single_transformer_blocks:
            _, tokens = run_block(model, block, tokens, None, temb, rotary, None, next(of_block))
        sample = final_layer(model, last_tokens(as_residual(tokens), prompt.shape[1]), temb, last)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def unbatched(ids: Any) -> Tensor:
    """Positions `[S, 3]`; older pipelines give a batch of equal ones."""
    positions: Tensor = ids[0] if ids.ndim == 3 else ids
    return positions
