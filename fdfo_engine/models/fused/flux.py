"""FLUX's transformer on the engine's fused ops."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from fdfo_engine.models.fused.linear import parts_of, project
from fdfo_engine.models.fused.modulation import (
    Attended,
    Modulations,
    Residual,
    attend_and_feed,
    attention_outputs,
    modulation_of,
)
from fdfo_engine.models.fused.sd3 import NOTHING, Carried, Rows, final_layer, is_checkpointed, run_block
from fdfo_engine.models.fused.streams import Settings, StreamAttention
from fdfo_engine.ops import feed_forward, gated_residual_norms

Rotary = tuple[Tensor, Tensor]


class FusedDoubleBlock:
    """The forward of a `FluxTransformerBlock`; its weights stay in the block."""

    def __init__(self, block: Any, settings: Settings) -> None:
        self.block = block
        self.recompute = settings.recompute_fc1
        self.attention = StreamAttention(block.attn, settings, text_first=True, rotary=True)
        self.joints = self.attention.joints
        self.norms = (block.norm1, block.norm1_context)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulation: Rows = (None, None),
        carried: Carried | None = None,
    ) -> tuple[Any, ...]:
        """As the block's own; `modulation` and `carried` are those of `FusedJointBlock`."""
        block, x, text = self.block, hidden_states, encoder_hidden_states
        row, text_row = (modulation_of(norm, temb, made) for norm, made in zip(self.norms, modulation, strict=True))
        shift, scale, gate, *feed = row.chunk(6, 1)
        text_shift, text_scale, text_gate, *text_feed = text_row.chunk(6, 1)
        y, y_gate, text_y, text_y_gate = carried or NOTHING
        (x, n), (text, text_n) = gated_residual_norms(
            [Residual(x, y, y_gate).to_norm(scale, shift),
             Residual(text, text_y, text_y_gate).to_norm(text_scale, text_shift)]
        )  # fmt: skip
        mixed = self.attention(text_n, n, rotary=image_rotary_emb)
        layers = [block.attn.to_add_out, block.attn.to_out[0]]
        after_text, after = attention_outputs(layers, mixed, [(text, text_gate), (x, gate)])
        attended = Attended(after, feed, block.ff), Attended(after_text, text_feed, block.ff_context)
        found, found_text = attend_and_feed(attended, recompute=self.recompute)
        if carried is None:
            return within_half(found_text.joined()), found.joined()
        return found_text.x, found.x, (*found[1:], *found_text[1:])


class FusedSingleBlock:
    """The forward of a `FluxSingleTransformerBlock`; its weights stay in the block."""

    def __init__(self, block: Any, settings: Settings) -> None:
        self.block = block
        self.recompute = settings.recompute_fc1
        self.attention = StreamAttention(block.attn, settings, rotary=True)
        self.joints = self.attention.joints
        self.norms = (block.norm,)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulation: tuple[Tensor | None] = (None,),
        carried: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> tuple[Any, ...]:
        """As the block's own. Without `encoder_hidden_states`, `hidden_states` are text and image tokens, joined.

        With `carried`, the last gated output of these and its gate, the sum is made here, and this block's own output
        and gate are handed on: None, the tokens, `carried`.
        """
        text, x = encoder_hidden_states, hidden_states
        if text is not None:
            x = torch.cat([text, x], 1)
        shift, scale, gate = modulation_of(self.block.norm, temb, modulation[0]).chunk(3, 1)
        ((x, n),) = gated_residual_norms([Residual(x, *carried or ()).to_norm(scale, shift)])
        found = self._out(n, self.attention(n, rotary=image_rotary_emb), x, gate)
        if carried is not None:
            return None, found.x, found[1:]
        x = within_half(found.joined())
        if text is None:
            return None, x
        text, x = x.split([text.shape[1], hidden_states.shape[1]], 1)
        return text, x

    def _out(self, n: Tensor, mixed: Tensor, x: Tensor, gate: Tensor) -> Residual:
        """`proj_out` of attention and feed-forward side by side: the sum of two products, nothing is joined."""
        up, down = parts_of(self.block.proj_mlp), parts_of(self.block.proj_out)
        if up.lora_a is not None or down.lora_a is not None:
            both = torch.cat([mixed, project(self.block.proj_mlp, n, gelu=True)], 2)
            return attention_outputs([self.block.proj_out], both, [(x, gate)])[0]
        return Residual(x, feed_forward(n, *up[:2], *down[:2], beside=mixed, recompute=self.recompute), gate)


class FusedFlux:
    """The forward of a `FluxTransformer2DModel` whose blocks are fused."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model = model
        double = [FusedDoubleBlock(block, settings) for block in model.transformer_blocks]
        single = [FusedSingleBlock(block, settings) for block in model.single_transformer_blocks]
        self.blocks: list[FusedDoubleBlock | FusedSingleBlock] = [*double, *single]
        norms = [norm for block in self.blocks for norm in block.norms]
        self.modulations = Modulations([*norms, model.norm_out], rehome=settings.rehome)

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
        x, text = model.x_embedder(hidden_states), model.context_embedder(encoder_hidden_states)
        told = [1000 * t.to(x.dtype) for t in (timestep, guidance) if t is not None]
        temb = model.time_text_embed(*told, pooled_projections)
        rotary = model.pos_embed(torch.cat([unbatched(txt_ids), unbatched(img_ids)]))
        residual, temb, last = self._blocks(x, text, temb, rotary)
        sample = final_layer(model, residual, temb, last)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _blocks(self, x: Tensor, text: Tensor, temb: Tensor, rotary: Rotary) -> tuple[Residual, Tensor, Tensor | None]:
        """Image tokens after all blocks, `temb`, and the modulation of the last norm.

        Blocks hand on their last gated output, as SD3's do; not in float16, whose sums are clipped.
        """
        model, tokens, double = self.model, text.shape[1], len(self.model.transformer_blocks)
        *rows, last = self.modulations(temb)
        carries = not is_checkpointed(model) and x.dtype != torch.float16
        carried: Any = NOTHING if carries else None
        for i, block in enumerate(model.transformer_blocks):
            found = run_block(model, block, x, text, temb, rotary, None, (rows[2 * i], rows[2 * i + 1]), carried)
            text, x, carried = found if carries else (*found, None)
        if carries:
            text, x, carried = Residual(text, *carried[2:]).joined(), Residual(x, *carried[:2]).joined(), NOTHING[:2]
        joined = torch.cat([text, x], 1)
        for row, block in zip(rows[2 * double :], model.single_transformer_blocks, strict=True):
            found = run_block(model, block, joined, None, temb, rotary, None, (row,), carried)
            _, joined, carried = found if carries else (*found, None)
        y, gate = carried or NOTHING[:2]
        return Residual(joined[:, tokens:], None if y is None else y[:, tokens:], gate), temb, last


def within_half(x: Tensor) -> Tensor:
    """Clipped to what float16 holds, where that is the dtype, as diffusers does."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def unbatched(ids: Any) -> Tensor:
    """Positions `[S, 3]`; older pipelines give a batch of equal ones."""
    positions: Tensor = ids[0] if ids.ndim == 3 else ids
    return positions
