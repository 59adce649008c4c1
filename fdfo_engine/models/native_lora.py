"""A LoRA under the names of a model's original code, as ComfyUI, Forge and sd-scripts read it.

`lora_unet_` and the original module's path with underscores, then `.lora_down.weight`, `.lora_up.weight` and `.alpha`.
ComfyUI makes such keys from its own modules, for every model and in every version; it also takes what
`save_lora_weights` writes for SD3, FLUX.1 and Qwen-Image, but its older versions and other tools do not. The original
layers of SD3 and FLUX.1 run query, key and value as one product: their adapters are joined block by block, at the sum
of the ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fdfo_engine.runtime.errors import UsageError

NativeLayers = Mapping[str, tuple[str, ...]]
"""Original layer to the diffusers layers that are its rows, in order; `{}` is the block's number. Empty: same names."""

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_PARTS = (".lora_down.weight", ".lora_up.weight", ".alpha")


def to_native(weights: dict[str, Tensor], network: nn.Module, layers: NativeLayers) -> dict[str, Tensor]:
    """`weights` in diffusers' names with alpha folded in, renamed and joined; their alpha is their rank: scale 1.

    Raises:
        UsageError: an adapted layer of `network` has no counterpart among `layers`.
    """
    native: dict[str, Tensor] = {}
    adapted = {name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")}
    if strange := layers_without_name(network, adapted, layers):
        raise UsageError(f"export: style comfyui has no name for {strange[0]}; lora.targets: family is known to it")
    for layer, rows in _rows_by_layer(network, layers).items():
        parts = [name for name in rows if name in adapted]
        if parts:
            down = torch.cat([weights[f"{name}.lora_A.weight"] for name in parts])
            up = down.new_zeros(max(r.stop for r in rows.values()), len(down))
            column = 0
            for name in parts:
                part = weights[f"{name}.lora_B.weight"]
                up[rows[name], column : column + part.shape[1]] = part
                column += part.shape[1]
            native |= dict(zip(_keys(layer), (down, up, torch.tensor(float(column))), strict=True))
    return native


def layers_without_name(network: nn.Module, adapted: Iterable[str], layers: NativeLayers) -> list[str]:
    """Those of the `adapted` layers of `network` that have no counterpart among `layers`, sorted."""
    return sorted(set(adapted).difference(*_rows_by_layer(network, layers).values()))


@torch.no_grad()
def add_native(network: nn.Module, native: dict[str, Tensor], layers: NativeLayers) -> None:
    """Adds a LoRA in original names to the weights of `network`, as its readers do.

    Raises:
        ValueError: a key belongs to no layer of `network`.
    """
    unread = dict(native)
    for layer, rows in _rows_by_layer(network, layers).items():
        keys = _keys(layer)
        if keys[0] in unread:
            down, up, alpha = (unread.pop(key) for key in keys)
            change = up @ down * (alpha / len(down))
            for name, part in rows.items():
                weight = network.get_parameter(f"{name}.weight")
                weight.add_(change[part].to(weight))
    if unread:
        raise ValueError(f"no layer for {', '.join(sorted(unread)[:3])}")


def _keys(layer: str) -> list[str]:
    return [f"lora_unet_{layer.replace('.', '_')}{part}" for part in _PARTS]


def _rows_by_layer(network: nn.Module, layers: NativeLayers) -> dict[str, dict[str, slice]]:
    """Original layers of `network`, each with the diffusers layers that it is made of and the rows that they are."""
    owners = {part: layer for layer, parts in layers.items() for part in parts}
    linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | BaseTunerLayer)}
    found: dict[str, dict[str, slice]] = {}
    for name in linear:
        number = match[1] if (match := _BLOCK.search(name)) else ""
        pattern = _BLOCK.sub("blocks.{}.", name, count=1)
        layer = owners.get(pattern) if layers else pattern
        if layer is not None:
            parts = [part.format(number) for part in layers.get(layer, (pattern,))]
            found[layer.format(number)] = _rows(parts, [int(linear[part].out_features) for part in parts])
    return found


def _rows(names: Sequence[str], heights: Sequence[int]) -> dict[str, slice]:
    stops = torch.tensor(heights).cumsum(0).tolist()
    return {n: slice(stop - height, stop) for n, height, stop in zip(names, heights, stops, strict=True)}
