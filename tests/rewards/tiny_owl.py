"""A tiny random OWLv2 with its processor, as a folder that transformers loads."""

import torch
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

LETTERS = "abcdefghijklmnopqrstuvwxyz,."


def build_tiny_owl(folder, *, side=32):
    """Random weights, 16 boxes an image; confidences spread over 0..1. The tokenizer knows letters."""
    vocab = ["!", "<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    texts = {"vocab_size": len(vocab), "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(side)
    network = Owlv2ForObjectDetection(
        Owlv2Config(
            text_config={**tower, **texts, "pad_token_id": 0},
            vision_config={**tower, "image_size": side, "patch_size": 8},
            projection_dim=32,
        )
    )
    generator = torch.Generator().manual_seed(side)
    for parameter in network.parameters():  # its own initial weights are so small that every text is the same
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    network.save_pretrained(folder)
    tokenizer = CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(vocab)}, merges=[], pad_token="!", model_max_length=24
    )
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": side, "width": side}), tokenizer).save_pretrained(folder)
    return folder
