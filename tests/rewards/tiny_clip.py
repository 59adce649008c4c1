"""Tiny random CLIP models with their processors, as folders that transformers loads."""

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {byte: chr(byte) for byte in VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}
"""What byte-level vocabularies write for each byte of a text."""


def build_tiny_clip(folder, *, side=32, patch=8, with_processor=True, eos_in_config=1):
    """Random weights, 24 numbers an embedding; the tokenizer knows bytes, so prompts differ in length."""
    vocab = ["<|startoftext|>", "<|endoftext|>", *BYTES.values(), *(mark + "</w>" for mark in BYTES.values())]
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(side)
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **tower, "vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": eos_in_config, "pad_token_id": 1,
                "max_position_embeddings": 40,
            },
            vision_config={**tower, "image_size": side, "patch_size": patch},
            projection_dim=24,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(side)
    for parameter in model.parameters():  # its own initial weights are so small that every text is the same
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    model.save_pretrained(folder)
    if with_processor:
        tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(vocab)}, merges=[])
        tokenizer.save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
            folder
        )
    return folder
