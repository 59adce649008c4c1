"""Builds the bench's model: a genuine diffusers `StableDiffusion3Pipeline`, small enough for a CPU and a checkout."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.shapes.render import SIZE
from fdfo_engine.shapes.scene import WORDS

PROMPT_TOKENS = 12
"""Length of an encoded prompt; the longest shapes caption takes 10 tokens with its start and end."""

LATENT_CHANNELS = 4
VAE_SCALE = 4
SHIFT = 2.0
"""Timestep shift of the scheduler: as 3.0 is to SD3 at 1024 pixels, less is enough for 64."""

_WIDTH, _DEPTH, _HEAD = 96, 6, 32
_TEXT_WIDTH, _TEXT_DEPTH = 64, 2
_START, _END = "<|startoftext|>", "<|endoftext|>"


def shapes_base() -> Path:
    """Returns the folder of the pretrained pipeline that ships with the package."""
    return Path(__file__).parent / "base"


def build_pipeline(seed: int = 0) -> Any:
    """Returns the pipeline with fresh float32 weights drawn from `seed`; the global random state is left as it was."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusion3Pipeline(
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=_tokenizer(),
            text_encoder_2=_text_encoder(),
            tokenizer_2=_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )


def load_pipeline(folder: Path) -> Any:
    """Returns the pipeline saved in `folder`, in float32, without touching the network."""
    from diffusers import StableDiffusion3Pipeline

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True, **absent)


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Writes the pipeline to `folder` as float16 safetensors; `pipe` keeps its weights."""
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    exact = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    for module in modules:
        module.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    for module, state in zip(modules, exact, strict=True):
        module.float().load_state_dict(state)


def encode_captions(pipe: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Encodes captions as `pipe.encode_prompt(..., max_sequence_length=0)` does, but differentiably and faster.

    Returns the prompt embeddings [B, S, D] and the pooled embeddings [B, E].
    """
    ids = pipe.tokenizer(
        list(texts), padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return encode_tokens(pipe, ids)


def encode_tokens(pipe: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The part of `encode_captions` after the tokenizer: both text encoders on the same ids [B, S]."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return hidden, torch.cat([output.text_embeds for output in outputs], dim=-1)


def _transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIZE // VAE_SCALE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=_DEPTH,
        attention_head_dim=_HEAD,
        num_attention_heads=_WIDTH // _HEAD,
        caption_projection_dim=_WIDTH,
        joint_attention_dim=2 * _TEXT_WIDTH,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=SIZE // VAE_SCALE // 2,
        qk_norm="rms_norm",
    ).eval()


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    vocabulary, _ = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=4 * _TEXT_WIDTH,
        num_hidden_layers=_TEXT_DEPTH,
        num_attention_heads=_TEXT_WIDTH // 32,
        max_position_embeddings=PROMPT_TOKENS,
        projection_dim=_TEXT_WIDTH,
        bos_token_id=vocabulary[_START],
        eos_token_id=vocabulary[_END],
        pad_token_id=vocabulary[_END],
    )
    encoder = CLIPTextModelWithProjection(config).eval()
    # with CLIP's own 0.02 all captions look alike to the transformer until training has made its tables larger
    for table in (encoder.text_model.embeddings.token_embedding, encoder.text_model.embeddings.position_embedding):
        torch.nn.init.normal_(table.weight, std=0.8)
    return encoder


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-pair vocabulary, learned until each of our words is one token; other words fall apart into letters."""
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in WORDS]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces, merges = [_START, _END, *letters, *(f"{letter}</w>" for letter in letters)], []
    while any(len(word) > 1 for word in words):
        pair = Counter(pair for word in words for pair in pairwise(word)).most_common(1)[0][0]
        words = [_merge(word, pair) for word in words]
        merges.append(pair)
        pieces.append("".join(pair))
    return {piece: index for index, piece in enumerate(pieces)}, merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged = word[:1]
    for piece in word[1:]:
        if (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
