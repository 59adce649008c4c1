"""What a reward says of itself, for a person who chooses one: its docstring, its options, its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fdfo_engine.config import describe_section
from fdfo_engine.rewards.model_options import PARAMETERS, ModelOptions
from fdfo_engine.rewards.registry import find

_OF_ALL = "besides, as every reward: weight, normalize, kill_after_s; see `fdfo train --help`"


def summary(name: str) -> str:
    """The first line of its docstring."""
    return (inspect.getdoc(find(name, "reward")) or "no docstring").splitlines()[0]


def description(name: str) -> Iterator[str]:
    """Blocks of lines: what it scores, its options with their defaults, its weights and whether they are here.

    Raises:
        UsageError: no such reward.
    """
    target = find(name, "reward")
    yield f"{name}\n\n{inspect.getdoc(target) or 'no docstring'}"
    options = getattr(target, "Options", None)
    lines = describe_section(options) if options else "\n".join(_keywords(target))
    yield f"options:\n{lines or '  none'}\n{_OF_ALL}"
    if options and issubclass(options, ModelOptions):
        yield "weights:\n" + "\n".join(weights(options.model_construct()))


def weights(options: ModelOptions, *, only_missing: bool = False) -> Iterator[str]:
    """A line for each thing that is loaded: its place, its size where that is known, whether it is on this machine.

    With `only_missing` of those alone that are not.
    """
    for source in dict.fromkeys(options.sources):
        is_here = source.is_here()
        if not (is_here and only_missing):
            is_network = source.model in options.networks
            size = _size(source.model, options.dtype) if is_network else "small: a tokenizer, or a head"
            where = "" if only_missing else "; on this machine" if is_here else "; not on this machine"
            yield f"  {source.model}: {size}{where}"


def _size(model: str, dtype: str) -> str:
    count = PARAMETERS.get(model)
    if count is None:
        return "size not known before it is loaded"
    width = torch.empty((), dtype=getattr(torch, dtype)).element_size()
    return f"{count / 1e6:,.0f} M parameters, {count * width / 1e9:.1f} GB in {dtype}"


def _keywords(target: Callable[..., Any]) -> Iterator[str]:
    """Of a function what may follow prompts and images, of a class what it is made with."""
    parameters = list(inspect.signature(target).parameters.values())
    for parameter in parameters if inspect.isclass(target) else parameters[2:]:
        is_required = parameter.default is inspect.Parameter.empty
        yield f"  {parameter.name} ({'required' if is_required else f'default {parameter.default!r}'})"
