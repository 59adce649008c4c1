"""Scores blocks of images in a thread, while the next ones are sampled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType

import torch
from torch import Tensor

from fdfo_engine.rewards.weighted import WeightedRewards
from fdfo_engine.runtime import pulse
from fdfo_engine.runtime.console import equal_warnings_counted, warn
from fdfo_engine.runtime.distributed import use_device
from fdfo_engine.runtime.errors import Stopped

MAX_BLOCKS_WAITING = 4
_POLL_S = 1.0
LAST_WAIT_S = 5.0
"""How long an ending waits for the batch that is being scored: a reward may hang."""


class BackgroundScorer:
    """Scores blocks one after another, in the order given, whether or not that overlaps: so scores are the same.

    Attributes:
        busy_s: seconds spent scoring. waited_s: seconds that the caller waited for it.
    """

    def __init__(
        self, rewards: WeightedRewards, *, overlap: bool = True, poll: Callable[[], bool] = lambda: False
    ) -> None:
        """Starts the thread.

        Args:
            rewards: what scores.
            overlap: false leaves room for one block only.
            poll: called every second while `scores` waits; true means that the run stops, and ends the waiting.
        """
        self._rewards, self._poll = rewards, poll
        self._most = MAX_BLOCKS_WAITING if overlap else 1
        self._futures: list[Future[dict[str, Tensor]]] = []
        self._has_failed = False
        self.busy_s = self.waited_s = 0.0
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = ThreadPoolExecutor(1, "scoring", use_device, (device,))
        self._warnings = equal_warnings_counted()

    def submit(self, prompts: Sequence[str], images: Tensor) -> None:
        """Queues images `[N, 3, H, W]` and does not wait: `has_room` bounds the queue. A failure shows in `scores`."""
        self._futures.append(self._thread.submit(self._score, list(prompts), images))

    def has_room(self) -> bool:
        """Whether fewer blocks than may be are still to be scored; waits for it a second at most.

        Who waits longer asks again, on several ranks all together: one alone would keep the others in a collective.
        """
        start = time.perf_counter()
        left = [future for future in self._futures if not future.done()]
        if len(left) >= self._most:
            left = list(wait(left, timeout=_POLL_S, return_when=FIRST_COMPLETED).not_done)
        self.waited_s += time.perf_counter() - start
        return len(left) < self._most

    def is_done(self) -> bool:
        """Whether all that was submitted is scored, or failed; waits for it a second at most."""
        start = time.perf_counter()
        done = not wait(self._futures, timeout=_POLL_S).not_done
        self.waited_s += time.perf_counter() - start
        return done

    def scores(self) -> dict[str, Tensor]:
        """Scores of everything submitted, by reward, in order.

        Raises:
            RewardError: of the first block that failed; blocks after it are not scored.
            Stopped: the poll said so.
        """
        start = time.perf_counter()
        try:
            if not all(map(self._is_done, self._futures)):
                raise Stopped("asked while images were scored")
            blocks = [future.result() for future in self._futures]
        finally:
            self.waited_s += time.perf_counter() - start
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}

    @property
    def submitted(self) -> int:
        """Blocks queued so far."""
        return len(self._futures)

    @property
    def scored(self) -> int:
        """How many of them are scored, or failed."""
        return sum(future.done() for future in self._futures)

    @property
    def hidden_s(self) -> float:
        """Seconds of scoring that nobody waited for."""
        return max(0.0, self.busy_s - self.waited_s)

    def __enter__(self) -> BackgroundScorer:
        self._warnings.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._has_failed = True
            self._rewards.cancel()
        try:
            self._thread.shutdown(wait=error is None, cancel_futures=True)
            if error is not None and wait(self._futures, timeout=LAST_WAIT_S).not_done:
                warn("a reward is still scoring; it is not waited for")
        finally:
            self._warnings.__exit__(None, None, None)

    def _is_done(self, future: Future[dict[str, Tensor]]) -> bool:
        """Waits for it; false if the run stops first."""
        while not wait([future], timeout=_POLL_S).done:
            if self._poll():
                return False
        return True

    def _score(self, prompts: list[str], images: Tensor) -> dict[str, Tensor]:
        start = time.perf_counter()
        try:
            if self._has_failed:  # an outage would be waited out once for every block
                raise RuntimeError("an earlier block failed")
            with pulse.work("a thread that scores"):
                return self._rewards(prompts, images)
        except BaseException:
            self._has_failed = True
            raise
        finally:
            self.busy_s += time.perf_counter() - start
