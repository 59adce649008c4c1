"""A whole Qwen-Image pipeline of random weights, small enough to train in a test; no network."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tiny_sd3 import liven
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

TEXT_WIDTH = 16
PREFIX_TOKENS = 34
"""What the pipeline drops of the real tokenizer's tokens; the tiny one splits its template into as many."""


def build_tiny_qwen_image(folder, **transformer_settings):
    """Saves a random Qwen-Image under `folder`; its VAE has channels of unequal mean and deviation."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(2, 2, 4), **transformer_settings,
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 0.5, 2.0, 1.5],
    )  # fmt: skip
    liven(transformer)
    liven(vae)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=4, max_image_seq_len=64,
        shift_terminal=0.02,
    )  # fmt: skip
    tokenizer = _tokenizer()
    pipeline = QwenImagePipeline(
        transformer=transformer.eval(),
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
    )
    prefix = pipeline.prompt_template_encode.split("{}")[0]
    assert len(tokenizer(prefix).input_ids) == PREFIX_TOKENS == pipeline.prompt_template_encode_start_idx
    pipeline.save_pretrained(folder)
    return folder


def _tokenizer():
    """Bytes, and every word of the pipeline's template as one token."""
    template = (
        "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:\nuser\n assistant\n"
    )
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [template], vocab_size=2000, new_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.padding_side = "right"
    return tokenizer


def _text_encoder(vocabulary):
    torch.manual_seed(2)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": vocabulary,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH,
        },
        vision_start_token_id=0, vision_end_token_id=0, vision_token_id=0, image_token_id=0, video_token_id=0,
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    liven(encoder)
    return encoder
