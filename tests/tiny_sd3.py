"""A whole SD3 pipeline of random weights, small enough to train in a test, and settings that run it; no network."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from fdfo_engine.config import Config

PROMPTS = ("a red circle", "two blue dogs", "a green square", "one cat")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZE = 16
CLIP_WIDTHS = (16, 24)
JOINT_WIDTH = 48


def build_tiny_sd3(folder, *, qk_norm="rms_norm", dual_attention_layers=(0,)):
    """Saves a random pipeline with both CLIPs and T5 under `folder`; the first block has a second attention."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=JOINT_WIDTH, caption_projection_dim=16,
        pooled_projection_dim=sum(CLIP_WIDTHS), pos_embed_max_size=8, qk_norm=qk_norm,
        dual_attention_layers=dual_attention_layers,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=SIZE,
        scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    liven(transformer)
    liven(vae)
    clips = [tiny_clip(width) for width in CLIP_WIDTHS]
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=clips[0][0],
        tokenizer=clips[0][1],
        text_encoder_2=clips[1][0],
        tokenizer_2=clips[1][1],
        text_encoder_3=tiny_t5(),
        tokenizer_3=tiny_t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_tree(folder, run_dir, **sections):
    """Settings as nested dicts; `sections` are laid over them key by key."""
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS))
    tree = {
        "run": {"dir": str(run_dir), "seed": 5, "epochs": 3},
        "model": {
            "id": str(folder), "dtype": "float32", "height": SIZE, "width": SIZE, "max_sequence_length": 16,
        },
        "lora": {"rank": 4, "alpha": 8.0},
        "prompts": {"source": str(prompts)},
        "sampling": {
            "pairs_per_epoch": 4, "steps": 4, "block_pairs": 2, "churn": {"schedule": "raw", "weight": 0.05},
        },
        "rewards": [{"name": "brightness", "weight": 1.0}],
        "update": {"optimizer_steps": 2, "micro_batch": 5},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"every": 0, "count": 2},
        "checkpoint": {"every": 1},
        "log": {"tensorboard": False, "images_every": 0},
        "kernels": {"tune": False},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    if tree["model"].get("train") == "full":
        tree.pop("lora")
    return tree


def tiny_config(folder, run_dir, **sections):
    """The checked `Config` of `tiny_tree`."""
    return Config.model_validate(tiny_tree(folder, run_dir, **sections))


def liven(module):
    """Fresh diffusers modules start with zeroed modulation; random weights everywhere make every path count."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5


def tiny_clip(width, kind=CLIPTextModelWithProjection):
    """A random CLIP text encoder of class `kind` and its tokenizer, a token a letter."""
    vocab = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(vocab)}, merges=[])
    tokenizer.model_max_length = 77
    torch.manual_seed(width)
    encoder = kind(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    return encoder.eval(), tokenizer


def tiny_t5_tokenizer():
    """A token a letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    tokenizer.model_max_length = 512
    return tokenizer


def tiny_t5():
    """A random T5 encoder, JOINT_WIDTH wide."""
    torch.manual_seed(2)
    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=JOINT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()
