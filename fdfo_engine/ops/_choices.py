"""Which backend an op takes where none is named: what was measured for this run, by op and shape.

A chooser is asked at each call of a `chosen` op that is made `under` it. There are two: `Choices`, the table that a run
goes by, and whoever measures what goes into it. Without one, and for a shape that it does not know, an op takes the
first backend of a fixed order that fits (`_dispatch`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Shape = tuple[Any, ...]
"""Sizes, dtypes and names that tell one use of an op in a network from another; the batch is none of them."""


class Call(NamedTuple):
    """A call of an op where no backend is named."""

    op: str
    shape: Shape
    candidates: Callable[[], list[str]]
    """Backends that can run it here, the one that the fixed order takes first."""
    run: Callable[..., Any]
    """The op itself, which takes `arguments`, `settings` and a `backend`."""
    arguments: tuple[Any, ...]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Op and shape in words: the key of `Choices`."""
        return named(self.op, self.shape)


class Chooser(Protocol):
    """What says which backend a call takes."""

    def backend(self, call: Call) -> str | None:
        """Its name; None leaves it to the fixed order."""
        ...


class Choices:
    """Backends by name of a call; one that it lacks takes the fixed order. An op refuses what can't run here."""

    def __init__(self, backends: Mapping[str, str]) -> None:
        self.backends = dict(backends)
        self._by_shape: dict[tuple[str, Shape], str | None] = {}  # names are slow to make

    def backend(self, call: Call) -> str | None:
        """See `Chooser.backend`."""
        key = call.op, call.shape
        if key not in self._by_shape:
            self._by_shape[key] = self.backends.get(call.name)
        return self._by_shape[key]


def named(op: str, shape: Shape) -> str:
    """Op and shape in words, as `feed_forward 64 96-384-96 float32`."""
    return " ".join([op, *map(_word, shape)])


def _word(part: Any) -> str:
    if isinstance(part, tuple):
        return "-".join(map(_word, part))
    return str(part).removeprefix("torch.")


_chooser: ContextVar[Chooser | None] = ContextVar("chooser", default=None)


def current_chooser() -> Chooser | None:
    """The one that calls are made under now."""
    return _chooser.get()


def under(chooser: Chooser | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args, **kwargs)`, in which ops ask `chooser`."""
    token = _chooser.set(chooser)
    try:
        return function(*args, **kwargs)
    finally:
        _chooser.reset(token)


def chosen(
    shape: Callable[..., Shape], candidates: Callable[..., list[str]], *, no_name: Sequence[str | None] = (None,)
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes an op ask the chooser it is called under for its `backend`, a keyword, where that is one of `no_name`.

    `shape` and `candidates` are functions of the op's arguments without the backend.
    """

    def wrap(op: Callable[P, T]) -> Callable[P, T]:
        name = op.__name__

        @functools.wraps(op)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            chooser = _chooser.get()
            if chooser is None or kwargs.get("backend") not in no_name:
                return op(*args, **kwargs)
            rest = {key: value for key, value in kwargs.items() if key != "backend"}
            asked = Call(name, shape(*args, **rest), lambda: candidates(*args, **rest), op, args, rest)
            kwargs["backend"] = chooser.backend(asked) or no_name[0]
            return op(*args, **kwargs)

        return call

    return wrap
