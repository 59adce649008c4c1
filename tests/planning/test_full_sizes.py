"""The full-size models, counted from configs alone: `fdfo plan` needs neither their weights nor their memory."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tiny_sd3 import tiny_config

from fdfo_engine.planning.footprint import blank_footprint


def flux_dev():
    """diffusers' defaults are FLUX.1's; its VAE's are not."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return FluxPipeline, FluxTransformer2DModel(guidance_embeds=True), vae


def qwen_image():
    """diffusers' defaults are Qwen-Image's."""
    return QwenImagePipeline, QwenImageTransformer2DModel(), AutoencoderKLQwenImage()


def save_configs(folder, model):
    """The configs of a pipeline as the hub has them, and no weights."""
    with torch.device("meta"):
        pipeline_class, transformer, vae = model()
    for part, name in ((transformer, "transformer"), (vae, "vae")):
        part.save_config(folder / name)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_config(folder / "scheduler")
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    missing = {"text_encoder": None, "tokenizer": None}
    if pipeline_class is FluxPipeline:
        missing |= {"text_encoder_2": None, "tokenizer_2": None}
    pipeline_class(**parts, **missing).save_config(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "parameters"), [(flux_dev, 11_901_408_320), (qwen_image, 20_430_401_088)], ids=["flux", "qwen_image"]
)
def test_sizes_are_the_published_ones(tmp_path, model, parameters):
    save_configs(tmp_path, model)
    settings = {
        "dtype": "bfloat16",
        "height": 512,
        "width": 512,
        "max_sequence_length": 512,
        "gradient_checkpointing": True,
    }
    counted = blank_footprint(tiny_config(tmp_path, tmp_path / "run", model=settings))
    assert counted.frozen == 2 * parameters
    assert counted.velocity == 2 * 16 * 64 * 64
    assert counted.training.each > counted.forward.each > counted.velocity
    assert counted.trained == 4 * counted.trained_values > 0
