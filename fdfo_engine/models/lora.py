"""Low-rank adapters on a diffusers transformer, by peft, and their export for diffusers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

ADAPTER = "default"


def add_lora(network: Any, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Adds a LoRA to every module whose name ends in one of `targets`; A Gaussian from `seed`, B zero, float32.

    The frozen weights keep their dtype; peft casts activations at the adapter's door.

    Raises:
        ValueError: no module matches `targets`.
    """
    adapter = PeftLoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian", lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % (1 << 63))
        network.add_adapter(adapter, adapter_name=ADAPTER)
    for _, parameter in trainable(network):
        parameter.data = parameter.data.float()


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


def fold_alpha(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """`weights` with the LoRA scale multiplied into every B, so that a loader that ignores alpha is right too."""
    return {name: w * scale if ".lora_B." in name else w.clone() for name, w in weights.items()}
