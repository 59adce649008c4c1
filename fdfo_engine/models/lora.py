"""Low-rank adapters on a diffusers transformer, by peft, and their export for diffusers."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fdfo_engine.models.finite import is_finite
from fdfo_engine.models.lora_targets import target_layers, targets_present
from fdfo_engine.runtime.errors import NumericsError

ADAPTER = "default"

ATTENTION_PROJECTIONS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""LoRA targets of a joint attention, both its streams; not SD3.5-M's second attention `attn2`."""


def add_lora(network: Any, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> list[str]:
    """Adds a LoRA to the layers that `targets` name (`target_layers`); A Gaussian from `seed`, B zero, float32.

    The frozen weights keep their dtype; peft casts activations at the adapter's door. A family's targets are of all its
    models: those that `network` does not have are passed over.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: no target matches, or one matches another kind of module.
    """
    layers = target_layers(network, targets_present(network, targets) or targets)
    adapter = PeftLoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="|".join(map(re.escape, layers)),  # a pattern: of a list peft takes each name's ends too
        init_lora_weights="gaussian",
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % (1 << 63))
        network.add_adapter(adapter, adapter_name=ADAPTER)
    for _, parameter in trainable(network):
        parameter.data = parameter.data.float()
    return layers


def trainable(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient, in the network's order."""
    return ((name, p) for name, p in network.named_parameters() if p.requires_grad)


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Within this context the network computes what it did before `add_lora`."""
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters(False) would also drop requires_grad, which ZeRO relies on
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merge(network: nn.Module, folded: dict[str, Tensor]) -> float:
    """Adds a LoRA (diffusers' names, alpha folded in) to the weights of `network`, which has none.

    Returns:
        How far the weights' dtype lets the change go astray: rms of (realised - wanted) over rms of wanted, of all.

    Raises:
        NumericsError: a sum is not finite in the weights' dtype.
    """
    error = size = 0.0
    for name in (n.removesuffix(".lora_A.weight") for n in folded if n.endswith(".lora_A.weight")):
        weight: Any = network.get_submodule(name).weight
        a, b = (folded[f"{name}.lora_{part}.weight"].to(weight.device) for part in "AB")
        before, change = weight.float().clone(), b @ a  # of a float32 weight `float` is the weight itself
        weight.copy_(before + change)
        if not is_finite(weight):
            raise NumericsError(f"merged, the weight {name}.weight is not finite in {str(weight.dtype)[6:]}")
        error += float((weight.float() - before - change).square().sum())
        size += float(change.square().sum())
    return math.sqrt(error / size) if size else 0.0


def fold_alpha(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """`weights` with the LoRA scale multiplied into every B, so that a loader that ignores alpha is right too."""
    return {name: w * scale if ".lora_B." in name else w.clone() for name, w in weights.items()}


class weights_in:  # noqa: N801 - a context manager, read as a verb
    """Puts float32 `weights`, by parameter name, into a network for a while; its own values come back after."""

    def __init__(self, network: nn.Module, weights: dict[str, Tensor]) -> None:
        self._parameters = dict(network.named_parameters())
        self._weights = weights

    def __enter__(self) -> None:
        self._saved = {name: self._parameters[name].detach().clone() for name in self._weights}
        self._write(self._weights)

    def __exit__(self, *_: object) -> None:
        self._write(self._saved)

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._parameters[name].copy_(weight)
