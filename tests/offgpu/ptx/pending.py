"""Work that threads begin, commit in groups and wait for, while they go on."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class _Work:
    threads: np.ndarray
    group: np.ndarray
    finish: Any


class Pending:
    """Of one kind. What is begun could be done at any time until it is waited for: here it is done then, not before."""

    def __init__(self, threads):
        self.groups, self.work = np.zeros(threads, np.int64), []

    def begin(self, threads, finish):
        """`threads` is a mask; `finish` will be called for some of them at a time."""
        self.work.append(_Work(threads, self.groups.copy(), finish))

    def commit(self, threads):
        """What these threads begin from now on belongs to another group."""
        self.groups += threads

    def due(self, threads, newest):
        """Threads and function of all that must be done, in order, before these threads go on: all but a few groups."""
        for work in self.work:
            due = work.threads & threads & (work.group < self.groups - newest)
            if due.any():
                yield due, work.finish
            work.threads = work.threads & ~due
        self.work = [work for work in self.work if work.threads.any()]
