"""Scores blocks of images in a thread, while the next ones are sampled."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from fdfo_engine.rewards.weighted import Scores, WeightedRewards

MAX_BLOCKS_WAITING = 4


class BackgroundScorer:
    """Scores blocks one after another, in the order given, whether or not that overlaps: so scores are the same.

    Attributes:
        busy_s: seconds spent scoring. waited_s: seconds that the caller waited for it.
    """

    def __init__(self, rewards: WeightedRewards, *, overlap: bool = True) -> None:
        """Starts the thread; `overlap` false scores each block while the caller waits."""
        self._rewards, self._overlap = rewards, overlap
        self._room = threading.Semaphore(MAX_BLOCKS_WAITING)
        self._futures: list[Future[Scores]] = []
        self._has_failed = False
        self.busy_s = self.waited_s = 0.0
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = ThreadPoolExecutor(1, "scoring", _use_device, (device,))

    def submit(self, prompts: Sequence[str], images: Tensor) -> None:
        """Queues images `[N, 3, H, W]`; waits where too many blocks are queued. A failure shows in `scores`."""
        start = time.perf_counter()
        self._room.acquire()
        self._futures.append(self._thread.submit(self._score, list(prompts), images))
        if not self._overlap:
            self._futures[-1].exception()
        self.waited_s += time.perf_counter() - start

    def scores(self) -> Scores:
        """Scores of everything submitted, in order.

        Raises:
            RewardError: of the first block that failed; blocks after it are not scored.
        """
        start = time.perf_counter()
        try:
            blocks = [future.result() for future in self._futures]
        finally:
            self.waited_s += time.perf_counter() - start
        parts = {name: torch.cat([block.parts[name] for block in blocks]) for name in blocks[0].parts}
        return Scores(torch.cat([block.total for block in blocks]), parts)

    @property
    def hidden_s(self) -> float:
        """Seconds of scoring that nobody waited for."""
        return max(0.0, self.busy_s - self.waited_s)

    def __enter__(self) -> BackgroundScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._has_failed = self._has_failed or error is not None
        self._thread.shutdown(cancel_futures=True)

    def _score(self, prompts: list[str], images: Tensor) -> Scores:
        start = time.perf_counter()
        try:
            if self._has_failed:  # an outage would be waited out once for every block
                raise RuntimeError("an earlier block failed")
            return self._rewards(prompts, images)
        except BaseException:
            self._has_failed = True
            raise
        finally:
            self._room.release()
            self.busy_s += time.perf_counter() - start


def _use_device(index: int | None) -> None:
    """A new thread would take GPU 0, whatever its rank's is."""
    if index is not None:
        torch.cuda.set_device(index)
