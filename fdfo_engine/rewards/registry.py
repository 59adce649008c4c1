"""Rewards by name: any callable from prompts and images to one score an image."""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fdfo_engine.runtime.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


class Reward(Protocol):
    """Scores images: `(prompts, images [N, 3, H, W] float32 in 0..1) -> [N]`, higher is better, NaN = no opinion."""

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """One score an image."""
        ...


_BUILT_IN = {"shapes": "shapes", "shapes_strict": "shapes", "brightness": "brightness"}
"""Registered name to the module of this package that registers it: imported only when asked for."""

_registered: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[F], F]:
    """Registers a reward under `name`: a function, or a class whose instances are called.

    Options of the config go to the function as keyword arguments, or to the class's constructor.
    """

    def keep(reward: F) -> F:
        if name in _registered:
            raise ValueError(f"register: a reward named {name!r} is registered already")
        _registered[name] = reward
        return reward

    return keep


def names() -> list[str]:
    """Every name a config may use."""
    return sorted({*_BUILT_IN, *_registered})


def build(name: str, options: dict[str, Any], where: str) -> Reward:
    """The reward `name` (registered, or `module:attribute`) with its `options`.

    Raises:
        UsageError: no such reward, or it takes no such option; `where` is the config key the message names.
    """
    target = _find(name, where)
    is_class = inspect.isclass(target)
    _check_options(target, options, where, bound=0 if is_class else 2)
    reward: Reward = target(**options) if is_class else functools.partial(target, **options)
    return reward


def _find(name: str, where: str) -> Callable[..., Any]:
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        importlib.import_module(f"{__package__}.{_BUILT_IN[name]}")
        return _registered[name]
    if ":" in name and "//" not in name:
        return _import(name, where)
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(
        f"{where} = {name!r}: no such reward. {hint}Registered: {', '.join(names())}; your own: module:attribute, "
        "or @fdfo_engine.rewards.register"
    )


def _import(name: str, where: str) -> Callable[..., Any]:
    module, attribute = name.split(":", 1)
    try:
        target: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{where} = {name!r}: {error}") from error
    if not callable(target):
        raise UsageError(f"{where} = {name!r}: is a {type(target).__name__}, takes something to call")
    return target


def _check_options(target: Callable[..., Any], options: dict[str, Any], where: str, bound: int) -> None:
    try:
        inspect.signature(target).bind(*[None] * bound, **options)
    except TypeError as error:
        raise UsageError(f"{where}: options {sorted(options)}: {error}") from error
