"""Rewards by name: any callable from prompts and images to one score an image."""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fdfo_engine.config import Config, RewardConfig
from fdfo_engine.config.section import Section
from fdfo_engine.rewards.reward import Reward, as_reward
from fdfo_engine.runtime.errors import FdfoError, UsageError
from fdfo_engine.runtime.failures import Failure
from fdfo_engine.runtime.own_code import named_by, own_callable

F = TypeVar("F", bound=Callable[..., Any])


_BUILT_IN = {
    "shapes": "shapes",
    "shapes_strict": "shapes",
    "brightness": "brightness",
    "clip": "clip",
    "pickscore": "clip",
    "hpsv2": "clip",
    "aesthetic": "aesthetic",
    "vlm": "vlm",
    "vlm_alignment": "vlm",
    "vlm_quality": "vlm",
    "vlm_photorealism": "vlm",
    "vlm_server": "vlm_server",
    "ocr": "ocr",
    "geneval": "geneval",
    "http": "http_reward",
    "person": "person",
}
"""Registered name to the module of this package that registers it: imported only when asked for."""

_registered: dict[str, Callable[..., Any]] = {}
_own: set[str] = set()
"""Names in it that `with_own_rewards` gave."""


def register(name: str) -> Callable[[F], F]:
    """Registers a reward under `name`: a function, or a class whose instances are called.

    Options of the config go to the function as keyword arguments, or to the class's constructor. A class with an
    attribute `Options`, a `Section`, gets them as one checked object instead.
    """

    def keep(reward: F) -> F:
        if name in _registered:
            raise ValueError(f"register: a reward named {name!r} is registered already")
        _registered[name] = reward
        return reward

    return keep


def with_own_rewards(config: Config, functions: Sequence[Callable[..., Any]]) -> Config:
    """`config` with these functions as its rewards, at weight 1; or as it is, if there are none.

    A function of a module is named `module:name`, so that other commands find it too; one that lives in this process
    only, such as a notebook's, by its name alone. Defined anew, it takes the place of the one before.

    Raises:
        UsageError: something that can't be called; two of one name; the name of a bundled or registered reward.
    """
    labels = [_own_name(function) for function in functions]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UsageError(f"rewards: two are named {twice[0]!r}; give each a name of its own")
    for label, function in zip(labels, functions, strict=True):
        if label in _BUILT_IN or (label in _registered and label not in _own):
            raise UsageError(f"rewards: {label!r} is the name of a registered reward; rename the function")
        _registered[label] = function
        _own.add(label)
    parts = tuple(RewardConfig(name=label, weight=1.0) for label in labels)
    return config.model_copy(update={"rewards": parts}) if parts else config


def _own_name(function: Callable[..., Any]) -> str:
    if not callable(function):
        raise UsageError(f"rewards: {function!r} is a {type(function).__name__}; takes functions (prompts, images)")
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", "__main__")
    if module == "__main__" or not name.isidentifier():
        return name.rsplit(".", 1)[-1]
    return f"{module}:{name}"


def names() -> list[str]:
    """Every name a config may use."""
    return sorted({*_BUILT_IN, *_registered})


def build(name: str, options: dict[str, Any], where: str) -> Reward:
    """The reward `name` (registered, `module:attribute`, `file.py:attribute`, or a reward server's URL) with `options`.

    Raises:
        UsageError: no such reward, or it takes no such option; `where` is the setting or option that the message names.
    """
    if name.startswith(("http://", "https://")):
        return build("http", {"url": name, **options}, where)
    target = find(name, where)
    if hasattr(target, "Options"):
        return _made(
            functools.partial(target, _checked(target.Options, options, where.removesuffix(".name"))), name, where
        )
    is_class = inspect.isclass(target)
    _check_options(target, options, where, bound=0 if is_class else 2)
    filled = functools.partial(target, **options)
    return _made(filled, name, where) if is_class else as_reward(filled)


def _made(make: Callable[[], Any], name: str, where: str) -> Reward:
    """An instance of a class; what goes wrong in the making of a user's own is told as such."""
    try:
        return as_reward(make())
    except FdfoError:
        raise
    except Exception as error:
        if ":" not in name:
            raise
        raise UsageError(f"{named_by(where, name)}: cannot be made: {Failure.of(error)}") from error


def find(name: str, where: str) -> Callable[..., Any]:
    """What is behind a name: a function, or a class whose instances score.

    Raises:
        UsageError: nothing is; `where` is the config key the message names.
    """
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        importlib.import_module(f"{__package__}.{_BUILT_IN[name]}")
        return _registered[name]
    if ":" in name and "//" not in name:
        return own_callable(name, where)
    if name.endswith(".py"):
        raise UsageError(f"{named_by(where, name)}: is a file; takes one of its functions or classes, {name}:NAME")
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(
        f"{named_by(where, name)}: no such reward. {hint}Registered: {', '.join(names())}; your own: module:attribute, "
        "./file.py:attribute, http(s)://server, or @fdfo_engine.rewards.register"
    )


def _check_options(target: Callable[..., Any], options: dict[str, Any], where: str, bound: int) -> None:
    try:
        inspect.signature(target).bind(*[None] * bound, **options)
    except TypeError as error:
        raise UsageError(f"{where}: options {sorted(options)}: {error}") from error


def _checked(kind: type[Section], options: dict[str, Any], where: str) -> Section:
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        problems = [_sentence(kind, detail, where) for detail in error.errors(include_url=False, include_input=False)]
        raise UsageError("\n".join(problems)) from None


def _sentence(kind: type[Section], detail: ErrorDetails, where: str) -> str:
    key = ".".join(map(str, (where, *detail["loc"])))
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown option; {'; '.join(_advice(kind, str(detail['loc'][-1])))}"
    return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _advice(kind: type[Section], key: str) -> Iterator[str]:
    if near := difflib.get_close_matches(key, kind.model_fields, n=1):
        yield f"did you mean {near[0]}?"
    yield f"takes {', '.join(kind.model_fields)}"
