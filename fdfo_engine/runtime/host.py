"""Leaves the process that hosts an engine as it was: libraries change what is everybody's."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()


@contextmanager
def host_kept() -> Iterator[None]:
    """On exit environment variables, the excepthook and warning filters are what they were on entry.

    One thread at a time: two engines may be built at once, and libraries load models through globals of theirs.
    """
    with _lock:
        environment, hook = dict(os.environ), sys.excepthook
        try:
            with warnings.catch_warnings():
                _ignore_what_retires()
                yield
        finally:
            _restore_environment(environment)
            sys.excepthook = hook
            _ignore_what_retires()


def _ignore_what_retires() -> None:
    """The one filter that stays: DeepSpeed calls torch.distributed, once a step, by a name that is about to go."""
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
