"""Frozen weights in four bits, by bitsandbytes: a large model on a small GPU, with a LoRA trained on top."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fdfo_engine.runtime.errors import EnvironmentProblem

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight: four bits, a byte of scale for each 64, and a float32 scale for each 256 of those."""

_BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def quantize(transformer: Any) -> None:
    """Replaces each linear layer inside the blocks by bitsandbytes' NF4 one; `.to(device)` then packs the weights.

    What comes before and after the blocks keeps its dtype, as do biases and norms. Products are computed in that dtype.
    The model that is sampled and trained is from here on the quantised one.

    Raises:
        EnvironmentProblem: bitsandbytes is not installed.
    """
    try:
        bnb = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise EnvironmentProblem(
            "model.quantize = nf4: needs bitsandbytes; pip install 'fdfo-engine[quantize]'"
        ) from error
    for parent, name, linear in list(_linears(transformer)):
        weight = linear.weight
        with torch.device("meta"):
            packed = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None,
                compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
        packed.weight = bnb.nn.Params4bit(
            weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
        )
        packed.bias = linear.bias
        # a CPU's own layout, taken without gradient only: a rollout would compute otherwise than training
        packed.support_avx512bf16_for_cpu = False
        setattr(parent, name, packed)


def unpack(transformer: Any) -> None:
    """Undoes `quantize`, but for what four bits have lost: the layers' weights are then those they compute with."""
    bnb = importlib.import_module("bitsandbytes")
    for parent in list(transformer.modules()):
        for name, packed in list(parent.named_children()):
            if isinstance(packed, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
                with torch.device("meta"):
                    linear = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
                linear.weight = nn.Parameter(weight.to(packed.compute_dtype), requires_grad=False)
                linear.bias = packed.bias
                setattr(parent, name, linear)


def quantized_bytes(transformer: Any) -> tuple[int, int]:
    """What `quantize` would save of the weights of `transformer`, and what unpacking its largest one takes; bytes."""
    weights = [linear.weight for _, _, linear in _linears(transformer)]
    saved = sum(w.nbytes - int(NF4_BYTES * w.numel()) for w in weights)
    return saved, max((w.nbytes for w in weights), default=0)


def _linears(transformer: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and layer of each; those of a LoRA are not among them, the layers that they adapt are."""
    for blocks in (getattr(transformer, name) for name in _BLOCKS if hasattr(transformer, name)):
        for parent in blocks.modules():
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear and "lora_" not in name and not isinstance(parent, nn.ModuleDict):
                    yield parent, name, layer
