"""Frozen weights in four bits, by bitsandbytes: a large model on a small GPU, with a LoRA trained on top."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdfo_engine.config import Config
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight: four bits, a byte of scale for each 64, and a float32 scale for each 256 of those."""

FOUR_BITS = "four bits of bitsandbytes"

_LOOKED_AT = 1 << 14
_BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def quantizing_library() -> Any:
    """The package that `model.quantize` needs.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise EnvironmentProblem(
            "model.quantize = nf4: needs bitsandbytes; pip install 'fdfo-engine[quantize]'"
        ) from error


def quantize(transformer: Any) -> None:
    """Replaces each linear layer inside the blocks by bitsandbytes' NF4 one; `.to(device)` then packs the weights.

    What comes before and after the blocks keeps its dtype, as do biases and norms. Products are computed in that dtype.
    The model that is sampled and trained is from here on the quantised one; what the weights lose is said.

    Raises:
        EnvironmentProblem: bitsandbytes is not installed.
    """
    bnb = quantizing_library()
    linears = list(_linears(transformer))
    say(_cost([linear.weight for _, _, linear in linears]))
    for parent, name, linear in linears:
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
        setattr(parent, name, packed)
    compute_alike(transformer)


def _cost(weights: Sequence[Tensor]) -> str:
    """What a person should know of the model that is trained from here on."""
    return (
        f"model.quantize = nf4: {len(weights)} layers in four bits, their weights off by {rounding_error(weights):.1%} "
        "(rms); a small model can lose much: hold its score before training against that of model.quantize=null"
    )


def rounding_error(weights: Sequence[Tensor]) -> float:
    """Root mean square of what four bits change, over that of the weights; from the first values of each."""
    functional = importlib.import_module("bitsandbytes").functional
    lost = kept = 0.0
    for weight in weights:
        values = weight.detach().flatten()[:_LOOKED_AT].float()
        packed, state = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
        lost += float((functional.dequantize_4bit(packed, state).view(-1) - values).double().square().sum())
        kept += float(values.double().square().sum())
    return math.sqrt(lost / kept)


def compute_alike(network: nn.Module) -> None:
    """Has packed layers compute in a rollout as in training: without gradients, a CPU would take its own layout."""
    layers: Iterator[Any] = network.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def unpack(transformer: Any, dtype: torch.dtype) -> None:
    """Undoes packing in four bits, but for what they have lost: the weights are those that layers compute with."""
    bnb = importlib.import_module("bitsandbytes")
    for parent in list(transformer.modules()):
        for name, packed in list(parent.named_children()):
            if isinstance(packed, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
                with torch.device("meta"):
                    linear = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
                linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
                linear.bias = packed.bias
                setattr(parent, name, linear)


def quantized_bytes(transformer: Any) -> tuple[int, int]:
    """What `quantize` would save of the weights of `transformer`, and what unpacking its largest one takes; bytes."""
    weights = [linear.weight for _, _, linear in _linears(transformer)]
    saved = sum(w.nbytes - int(NF4_BYTES * w.numel()) for w in weights)
    return saved, max((w.nbytes for w in weights), default=0)


def packing(config: Mapping[str, Any]) -> str | None:
    """How weights lie in their files, in words, by a network's config.json; None where they are whole."""
    found = config.get("quantization_config")
    if not found:
        return None
    method = str(found.get("quant_method", "an unnamed method"))
    if method != "bitsandbytes":
        return method
    return FOUR_BITS if found.get("load_in_4bit") or found.get("_load_in_4bit") else "eight bits of bitsandbytes"


def refuse_packed(config: Config, packed_by: str | None) -> None:
    """Refuses settings that a transformer whose files are packed (`packing`) does not fit.

    Raises:
        UsageError: such a setting, or another packing than bitsandbytes' in four bits.
    """
    if packed_by is None:
        return
    what = f"model.id = {config.model.id!r}: its transformer is quantised: {packed_by}"
    if packed_by != FOUR_BITS:
        raise UsageError(f"{what}; takes {FOUR_BITS}, or whole weights, which model.quantize: nf4 packs")
    if config.model.quantize:
        raise UsageError(f"{what} already, and model.quantize = {config.model.quantize}; set that to null")
    if config.model.train == "full":
        raise UsageError(f"{what}, and model.train = full; packed weights are not trained: takes lora")
    if config.zero.stage == 3:
        raise UsageError(f"{what}, and zero.stage = 3; packed weights are not split over ranks: takes a lower stage")


def _linears(transformer: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and layer of each; those of a LoRA are not among them, the layers that they adapt are."""
    for blocks in (getattr(transformer, name) for name in _BLOCKS if hasattr(transformer, name)):
        for parent in blocks.modules():
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear and "lora_" not in name and not isinstance(parent, nn.ModuleDict):
                    yield parent, name, layer
