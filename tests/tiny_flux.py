"""A whole FLUX.1 pipeline of random weights, small enough to train in a test; no network."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_sd3 import JOINT_WIDTH, SIZE, liven, tiny_clip, tiny_t5, tiny_t5_tokenizer
from transformers import CLIPTextModel

POOLED_WIDTH = 16


def build_tiny_flux(folder, *, schnell=False, in_channels=16, vae_levels=2):
    """Saves a random FLUX.1-dev under `folder`: embedded guidance and a shift by resolution; schnell has neither."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=in_channels, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=JOINT_WIDTH, pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=not schnell, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * vae_levels, up_block_types=("UpDecoderBlock2D",) * vae_levels,
        block_out_channels=(8,) * vae_levels, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=SIZE, scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    liven(transformer)
    liven(vae)
    clip, tokenizer = tiny_clip(POOLED_WIDTH, CLIPTextModel)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if schnell else 3.0, use_dynamic_shifting=not schnell, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=4, max_image_seq_len=64,
    )  # fmt: skip
    FluxPipeline(
        transformer=transformer.eval(),
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(),
        tokenizer_2=tiny_t5_tokenizer(),
    ).save_pretrained(folder)
    return folder
