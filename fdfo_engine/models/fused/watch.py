"""Notices what is put on a part of a fused transformer that its fused forward would pass over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

Refusals = Callable[[nn.Module], Iterable[str]]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module of torch keeps its hooks."""

_TREES = ("_modules", "_parameters")


class Processor(NamedTuple):
    """How a diffusers attention module computes."""

    kind: type
    backend: Any
    is_parallel: bool
    joins_projections: bool


def processor_of(attention: Any) -> Processor:
    """What stands on `attention` now."""
    processor = attention.processor
    return Processor(
        kind=type(processor),
        backend=getattr(processor, "_attention_backend", None),
        is_parallel=getattr(processor, "_parallel_config", None) is not None,
        joins_projections=bool(getattr(attention, "fused_projections", False)),
    )


def own_layers(part: nn.Module) -> list[nn.Module]:
    """`part` and all modules below it, without adapters: an adapted layer counts as the layer itself."""
    if isinstance(part, BaseTunerLayer):
        return own_layers(part.get_base_layer())
    return [part, *(layer for child in part.children() for layer in own_layers(child))]


class Watch:
    """Asked before each fused call of `part` whether it still fits, for which `refusals` gives the reasons.

    `refusals` reads every layer, which takes as long as a small block. So its answer is kept, beside a list of all that
    it depends on and that may change after fusing; only when that list differs, is it asked again.
    """

    def __init__(self, part: nn.Module, refusals: Refusals) -> None:
        self._part, self._refusals = part, refusals
        self._layers = own_layers(part)
        self._reasons: list[str] = []
        self._seen: tuple[list[Any], ...] | None = None

    def reasons(self) -> list[str]:
        """Why the fused forward can't run `part` as it is now, one sentence each; empty where it can."""
        if _has_any_global_hook():
            return ["a hook stands on all modules (torch.nn.modules.module.register_module_*_hook)"]
        if self._seen is None or self._state() != self._seen:
            self._look()
        return self._reasons

    def _look(self) -> None:
        modules = list(self._part.modules())
        self._fields = list(map(vars, modules))
        self._children, self._parameters = ([fields[name] for fields in self._fields] for name in _TREES)
        self._hooks = [fields[name] for fields in self._fields for name in HOOKS]
        self._adapters = _of_kind(modules, BaseTunerLayer)
        self._attentions = _of_kind(modules, Attention, AttentionModuleMixin)
        self._dropouts = _of_kind(modules, nn.Dropout)
        self._seen = self._state()
        self._reasons = list(dict.fromkeys(self._refusals(self._part)))
        if not self._reasons and own_layers(self._part) != self._layers:
            self._reasons = ["a layer was replaced after fusing"]

    def _state(self) -> tuple[list[Any], ...]:
        """What `refusals` depends on: objects, not copies, so that a comparison is a walk over addresses."""
        parameters = list(chain.from_iterable(map(dict.values, self._parameters)))
        return (
            list(chain.from_iterable(map(dict.values, self._children))),
            list(chain.from_iterable(self._hooks)),  # the keys of hooks, which are never given twice
            [fields.get("forward") for fields in self._fields],
            list(map(type, parameters)),
            [None if parameter is None else parameter.dtype for parameter in parameters],
            [(a.active_adapters, a.disable_adapters, tuple(a.merged_adapters)) for a in self._adapters],
            [processor_of(attention) for attention in self._attentions],
            [dropout.p for dropout in self._dropouts],
            [vars(self._part).get("_chunk_size")],
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model is looked at anew: the lists above hold what belongs to this one."""
        return {"part": self._part, "refusals": self._refusals, "layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._part, self._refusals, self._layers = state["part"], state["refusals"], state["layers"]
        self._reasons, self._seen = [], None


def _of_kind(modules: Iterable[nn.Module], *kinds: type) -> list[Any]:
    return [module for module in modules if isinstance(module, kinds)]
