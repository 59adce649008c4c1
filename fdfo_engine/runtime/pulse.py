"""Signs of getting on, from whatever thread works: what the watchdog (`watch.py`) looks at.

A thread that only lives proves nothing. So those who work say so themselves, part by part: a solver step, a
micro-batch, a batch of scores, a collective that was left. Saying so costs as much as counting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
ENGINE = "the engine"


class Work:
    """What a thread is in the middle of.

    Attributes:
        name: for a person.
        parts: how many parts of it were done.
        may_last_until: what it does now has a limit of its own, and is not held against it before this time
            (`time.monotonic`).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.parts = 0
        self.may_last_until = 0.0

    def got_on(self, limit_s: float) -> None:
        """One part more; the next one ends by itself within `limit_s`."""
        self.parts += 1
        self.may_last_until = time.monotonic() + limit_s if limit_s else 0.0


_works: dict[int, Work] = {}


def _at_the_start() -> str:
    return "the start"


_place: Callable[[], str] = _at_the_start


def got_on(limit_s: float = 0.0) -> None:
    """This thread has done a part of its work. A helper that is not known here speaks for all who work.

    `limit_s` is for who waits with a limit of its own, such as a reward that is killed after some time: the next part
    may take as long as that, whatever `comm.timeout_s` is.
    """
    own = _works.get(threading.get_ident())
    for work in [own] if own is not None else list(_works.values()):
        work.got_on(limit_s)


@contextmanager
def work(name: str) -> Iterator[None]:
    """Within it this thread works, and is expected to get on."""
    thread = threading.get_ident()
    _works[thread] = Work(name)
    try:
        yield
    finally:
        _works.pop(thread, None)


def working(action: Callable[[], T]) -> T:
    """What `action` gives; for a helper thread that does nothing else."""
    with work("a helper thread"):
        return action()


def enter_phase(place: Callable[[], str]) -> None:
    """The engine's thread, which is this one, is in a phase, of which `place` says how far; watched from here on."""
    global _place
    _place = place
    _works.setdefault(threading.get_ident(), Work(ENGINE))


def works() -> dict[int, Work]:
    """What is in progress, by thread."""
    return dict(_works)


def place() -> str:
    """The phase that the engine is in, or was in last, and how far it got."""
    return _place()


def forget() -> None:
    """As before any work: a run begins, or has ended."""
    global _place
    _works.clear()
    _place = _at_the_start
