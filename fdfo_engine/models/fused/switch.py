"""The forward of a fused module, which hands a call to diffusers' own where the fused one would pass something over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from fdfo_engine.ops import Chooser, under
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import UsageError


class Notice:
    """Says once why a transformer's calls go to diffusers' own blocks; raises where the fused ones are required."""

    def __init__(self, *, required: bool) -> None:
        self._required = required
        self._told: set[str] = set()

    def __call__(self, reasons: Sequence[str]) -> None:
        """Says those of `reasons` that are new."""
        if self._required:
            why = "; ".join(reasons)
            raise UsageError(f"model.fused = true: this model does not fit the fused blocks any more: {why}")
        if new := [reason for reason in reasons if reason not in self._told]:
            self._told.update(new)
            say(f"model: diffusers' own blocks, not the fused ones: {'; '.join(new)}")


class Switch:
    """Runs `fused`, the forward of `module`, as long as `reasons()` is empty, and else the forward of its class.

    It stands as the attribute `forward` of `module`. Hooks that wrap that attribute later keep what they find there, so
    a switch stays where it is and is turned `off` in the end. `unknown` names arguments that `fused` can't take; one
    that the forward of the class does not have is a UsageError. Ops that `fused` calls ask its `chooser`, also where a
    checkpoint calls it again in a backward.
    """

    def __init__(
        self,
        module: nn.Module,
        fused: Callable[..., Any],
        reasons: Callable[[], list[str]],
        notice: Notice,
        *,
        unknown: Sequence[str] = (),
    ) -> None:
        self.module = module
        self.off = False
        self.chooser: Chooser | None = None
        self._fused, self._reasons, self._notice = fused, reasons, notice
        self.__wrapped__ = fused  # what inspect.signature reads
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if absent := [name for name in unknown if name not in names]:
            raise UsageError(
                f"attention_arguments = {absent[0]!r}: {type(module).__name__}.forward has no such argument; it takes "
                f"{', '.join(names)}"
            )
        self._num_own, self._unknown = len(names), {name: names.index(name) for name in unknown}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward; more arguments than the class takes come from a fused transformer, which has looked already."""
        if not self.off:
            if len(args) > self._num_own:
                return under(self.chooser, self._fused, *args, **kwargs)
            reasons = self._reasons() or list(self._refused_arguments(args, kwargs))
            if not reasons:
                return under(self.chooser, self._fused, *args, **kwargs)
            self._notice(reasons)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _refused_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
        for name, place in self._unknown.items():
            given = args[place] if place < len(args) else kwargs.get(name)
            if given:
                yield f"{name} has {', '.join(given)}"

    def remove(self) -> None:
        """Gives `module` its own forward back, also where a hook holds this switch meanwhile."""
        self.off = True
        if vars(self.module).get("forward") is self:
            del self.module.forward


def is_own_forward(module: nn.Module) -> bool:
    """Whether a call of `module` runs the forward of its class, or a switch to it, and nothing around them."""
    forward = vars(module).get("forward")
    if forward is None or isinstance(forward, Switch):
        return True
    return getattr(forward, "__func__", None) is type(module).forward  # what hooks leave that were removed
