"""Objects that give back what they hold, and are of no use afterwards."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from fdfo_engine.runtime.errors import UsageError


class Closable:
    """A base class: `close`, or a `with` block. What is asked of it after that is refused by name."""

    def close(self) -> None:
        """Gives back what it holds; a second call does nothing."""
        if not self.is_closed:
            self._release()
            self.__dict__.clear()
            self.__dict__["_has_closed"] = True

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return "_has_closed" in self.__dict__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        """Only called for what is not there."""
        if self.is_closed and not name.startswith("__"):
            raise UsageError(f"{type(self).__name__}.{name}: it was closed; build another one")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _release(self) -> None:
        """What only the subclass knows how to end; its attributes go afterwards."""
