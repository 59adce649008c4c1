"""Which layers `lora.targets` names, and how they are told."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import nn

_NUMBER = re.compile(r"(?<=blocks\.)\d+(?=\.)")
_NEAREST = 3


def target_layers(
    network: nn.Module, targets: Sequence[str], elsewhere: Mapping[str, nn.Module] | None = None
) -> list[str]:  # fmt: skip
    """Names of the linear layers of `network` that `targets` name, each once, in the network's order.

    A target is the name of a layer, or the end of one after a dot: `to_q` is `attn.to_q` and not `attn.add_to_q`. In it
    `*` stands for any characters but a dot: `single_transformer_blocks.*.proj_out` leaves out the network's own
    `proj_out`. What such a pattern matches beside linear layers is passed over.

    Args:
        network: without an adapter.
        targets: one or more.
        elsewhere: the pipeline's other parts by name, for the message about a layer of theirs.

    Raises:
        ValueError: a target that names no layer, with the nearest names, or that names a module of another kind.
    """
    found: set[str] = set()
    for target in targets:
        found.update(_layers_of(network, target, elsewhere or {}))
    return [name for name, _ in network.named_modules() if name in found]


def targets_present(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Those of `targets` that match something in `network`."""
    return [target for target in targets if _matches(network, target)]


def describe_layers(layers: Sequence[str]) -> str:
    """`3 layers: transformer_blocks.*.attn (to_q, to_k), proj_out`: of all blocks in one."""
    tails_by_head: dict[str, dict[str, None]] = {}
    for name in dict.fromkeys(of_any_block(layer) for layer in layers):
        match = re.fullmatch(r"(.*)\.([^.]*\D[^.]*(?:\.\d+)?)", name)  # the last part, with a number behind it
        head, tail = match.groups() if match else ("", name)
        tails_by_head.setdefault(head, {})[tail] = None
    groups = [f"{head} ({', '.join(tails)})" if head else ", ".join(tails) for head, tails in tails_by_head.items()]
    return f"{len(layers)} layer{'s' if len(layers) > 1 else ''}: {', '.join(groups)}"


def of_any_block(name: str) -> str:
    """`name` with `*` for the number of its block."""
    return _NUMBER.sub("*", name)


def _layers_of(network: nn.Module, target: str, elsewhere: Mapping[str, nn.Module]) -> list[str]:
    matches = _matches(network, target)
    layers = [name for name, module in matches.items() if isinstance(module, nn.Linear)]
    if not matches:
        raise ValueError(_says_nothing_matches(network, target, elsewhere))
    strange = [name for name in matches if name not in layers]
    if strange and not (layers and "*" in target):
        raise ValueError(_says_what_it_is(strange[0], matches[strange[0]], layers))
    return layers


def _matches(network: nn.Module, target: str) -> dict[str, nn.Module]:
    parts = [re.escape(part) for part in target.split("*")]
    pattern = re.compile(r"(?:.*\.)?" + r"[^.]*".join(parts))
    return {name: module for name, module in network.named_modules() if name and pattern.fullmatch(name)}


def _says_nothing_matches(network: nn.Module, target: str, elsewhere: Mapping[str, nn.Module]) -> str:
    owners = [part for part, module in elsewhere.items() if _matches(module, target)]
    if owners:
        return f"{target!r} names layers of {owners[0]}, and only the transformer is adapted"
    names = {of_any_block(name) for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    near = difflib.get_close_matches(target, sorted(_ends(names)), n=_NEAREST, cutoff=0.4)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    is_plain = re.fullmatch(r"[\w.]*", target)
    rule = "" if is_plain else "; a target is no regular expression: only * is special, any characters but a dot"
    return f"{target!r} names no layer of this model{hint}{rule}"


def _says_what_it_is(name: str, module: nn.Module, layers: list[str]) -> str:
    """`layers` are linear ones that the same target names."""
    inside = [f"{name}.{part}" for part, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    hint = f"; it holds {', '.join(inside[:_NEAREST])}" if inside else ""
    if layers:
        hint = f"; name what is meant in full, such as {of_any_block(layers[0])}"
    return f"{name} is a {type(module).__name__}; adapters are for linear layers{hint}"


def _ends(names: set[str]) -> set[str]:
    """Each of `names`, and each end of it that begins behind a dot with a word."""
    ends: set[str] = set()
    for name in names:
        parts = name.split(".")
        for start, part in enumerate(parts):
            if part != "*" and not part.isdigit():
                ends.add(".".join(parts[start:]))
    return ends
