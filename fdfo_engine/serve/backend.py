"""What the HTTP threads and the engine's thread share: the queue, the wish of the run, and a bell for who waits."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from starlette.concurrency import run_in_threadpool

from fdfo_engine.config import Config
from fdfo_engine.runtime.event_log import EVENTS_NAME
from fdfo_engine.runtime.events import EventStream, Feedback, Phase
from fdfo_engine.runtime.run_folder import EVALUATIONS_NAME, METRICS_NAME, checkpoint_store, read_log
from fdfo_engine.serve.commands import SERVE_FOLDER
from fdfo_engine.serve.database import Database
from fdfo_engine.serve.event_feed import EventFeed
from fdfo_engine.serve.problems import Problem
from fdfo_engine.serve.queue import Operation, Queue
from fdfo_engine.serve.rounds import Rounds, StoredPair

T = TypeVar("T")
Wish = Literal["idle", "running"]
MAX_QUEUED = 1000
GAP_WAIT_S = 5.0
_IMAGE_ID = re.compile("[0-9a-f]{32}")


def weighed_by_distance(
    rewards: Mapping[str, Sequence[float]], distances: Mapping[str, float]
) -> dict[str, list[float]]:
    """Rewards of each pair, drawn together around their mean by `min(1, distance / median distance)`.

    A choice says 1 and 0 however alike the two images are, and its gradient goes as 1 / distance: without this, pairs
    that a person can hardly tell apart pull hardest.
    """
    median = statistics.median(distances.values())
    weighed = {}
    for pair, (first, second) in rewards.items():
        share = min(1.0, distances[pair] / median) if median > 0 else 1.0
        mean, half = (first + second) / 2, share * (first - second) / 2
        weighed[pair] = [mean + half, mean - half]
    return weighed


class Bell:
    """Wakes coroutines from any thread, each in the event loop that it waits in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def ring(self) -> None:
        """Wakes all who wait."""
        with self._lock:  # nobody leaves meanwhile, and a loop that somebody waits in is open, unless it was torn down
            for event, loop in self._waiting.items():
                if not loop.is_closed():
                    loop.call_soon_threadsafe(event.set)

    async def until(self, look: Callable[[], T | None], seconds: float) -> T | None:
        """What `look` (in a thread) gives, once that is not None; None when `seconds` are over."""
        deadline = time.monotonic() + seconds
        with self._listening() as rung:
            while True:
                rung.clear()
                found = await run_in_threadpool(look)
                left = deadline - time.monotonic()
                if found is not None or left <= 0:
                    return found
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(rung.wait(), left)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        with self._lock:
            self._waiting[event] = asyncio.get_running_loop()
        try:
            yield event
        finally:
            with self._lock:
                del self._waiting[event]


class Told(Protocol):
    """What the backend needs of `Talk`."""

    stream: EventStream
    phase: Phase | None


class Backend:
    """One run folder being served.

    Attributes:
        config, folder: the settings and the run folder.
        queue, rounds: what was acknowledged. feed: the events. bell: rings when either has something new.
        token: what a request must bear.
        is_ready: whether the engine is loaded. is_closing: whether event streams should end. ranks: how many there are.
        interrupt: ends what the engine is amid.
        has_work: set when the engine's thread should look.
        status: what the engine's thread last said of itself: epoch, next_pair, weights_version, error, is_training.
    """

    def __init__(self, config: Config, database: Database, token: str, talk: Told, bell: Bell, ranks: int) -> None:
        self.config, self.token, self.ranks = config, token, ranks
        self.queue, self.rounds = Queue(database), Rounds(database)
        self.folder = Path(config.run.dir)
        self.feed = EventFeed(self.folder / EVENTS_NAME)
        self.bell = bell
        self.is_ready = self.is_closing = False
        self.has_work = threading.Event()
        self.status: dict[str, Any] = {
            "epoch": 0, "next_pair": 0, "weights_version": 0, "error": None, "is_training": False,
        }  # fmt: skip
        self.interrupt: Callable[[], None] = lambda: None
        self._talk = talk

    # the queue

    def submit(
        self, kind: str, body: Mapping[str, Any], *, key: str | None = None, seq: int | None = None
    ) -> Operation:
        """Queues an operation and wakes the engine.

        Raises:
            Problem: the queue is full (429); see `Queue.enqueue`.
        """
        if len(self.queue.operations("queued")) >= MAX_QUEUED:
            raise Problem(429, "queue_full", f"{MAX_QUEUED} operations wait", retry_after_s=5)
        operation = self.queue.enqueue(kind, body, key=key, seq=seq)
        self.has_work.set()
        return operation

    async def submit_in_order(self, kind: str, body: Mapping[str, Any], key: str | None) -> Operation:
        """A primitive; one that comes before its predecessor waits a little for it.

        Raises:
            Problem: the predecessor did not come (409); the run trains by itself (409).
        """
        if self.wish == "running":
            raise Problem(
                409, "running", "the run trains by itself", fix="POST /v1/run/pause, and wait until it is idle"
            )
        seq = int(body["seq"])
        await self.bell.until(lambda: self.queue.expected_seq >= seq or None, GAP_WAIT_S)
        rest = {name: value for name, value in body.items() if name != "seq"}
        operation = await run_in_threadpool(self.submit, kind, rest, key=key, seq=seq)
        self.bell.ring()
        return operation

    async def wait_for(self, number: int, seconds: float) -> Operation:
        """The operation once it is over, or as it is when `seconds` have passed.

        Raises:
            Problem: there is none (404).
        """

        def look() -> Operation | None:
            operation = self.queue.operation(number)
            if operation is None:
                raise Problem(404, "no_operation", f"operation {number}: there is none")
            return operation if operation.is_over else None

        found = await self.bell.until(look, seconds)
        if found is None:
            found = await run_in_threadpool(self.queue.operation, number)
        assert found is not None
        return found

    # the run

    @property
    def wish(self) -> Wish:
        """What somebody asked the run to do; kept over restarts."""
        return self.queue.fact("wish") or "idle"

    def set_wish(self, wish: Wish, *, now: bool = False) -> None:
        """Lets the run train by itself, or stop doing so: after its epoch, or `now`, which drops that."""
        self.queue.set_fact("wish", wish)
        if now:
            self.interrupt()
        self.has_work.set()

    @property
    def logs(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Lines of metrics.jsonl and of evaluations.jsonl."""
        return read_log(self.folder / METRICS_NAME), read_log(self.folder / EVALUATIONS_NAME)

    @property
    def checkpoints(self) -> list[str]:
        """Names of the whole ones, oldest first."""
        return checkpoint_store(self.folder).names()

    @property
    def phase(self) -> dict[str, Any] | None:
        """What is being done."""
        phase = self._talk.phase
        return None if phase is None else phase.model_dump(mode="json")

    # rounds

    def round(self, name: str) -> dict[str, Any]:
        """A round's row.

        Raises:
            Problem: there is none (404).
        """
        found = self.rounds.round(name)
        if found is None:
            raise Problem(404, "no_round", f"round {name!r}: there is none")
        return found

    def add_round(self, number: int, result: Mapping[str, Any]) -> None:
        """Records what operation `number` has sampled."""
        pairs = [
            StoredPair(p["pair_id"], p["prompt"], p["distance"], (p["images"][0], p["images"][1]))
            for p in result["pairs"]
        ]
        self.rounds.add_round(
            result["round"], number, first_pair=result["first_pair"], sampled=result["sampled"],
            weights_version=result["weights_version"], epoch=result["epoch"], pairs=pairs,
        )  # fmt: skip

    def rewards_of(self, name: str) -> dict[str, list[float]]:
        """What a round's feedback says, by pair: the mean over raters of each branch's reward."""
        by_pair: dict[int, list[tuple[float, float]]] = {}
        for opinion in self.rounds.opinions(name):
            first, second = opinion.rewards
            if first is not None and second is not None:
                by_pair.setdefault(opinion.pair, []).append((first, second))
        return {
            str(pair): [sum(branch) / len(given) for branch in zip(*given, strict=True)]
            for pair, given in sorted(by_pair.items())
        }

    def training_rewards(self, name: str) -> dict[str, list[float]]:
        """`rewards_of`, with choices weighed by distance where `labels.scale` says so."""
        rewards, opinions = self.rewards_of(name), self.rounds.opinions(name)
        if self.config.labels.scale == "none" or any(opinion.kind != "choice" for opinion in opinions):
            return rewards
        return weighed_by_distance(rewards, {str(pair.pair): pair.distance for pair in self.rounds.pairs(name)})

    def shown(self, pair: StoredPair, rater: str) -> tuple[int, int]:
        """The branches at the left and at the right for `rater`: the same at each call, and even over pairs."""
        text = f"{self.config.run.seed}\n{pair.pair}\n{rater}\n{self.token}"
        is_swapped = hashlib.sha256(text.encode()).digest()[0] & 1
        return (1, 0) if is_swapped else (0, 1)

    def tell_feedback(self, name: str, pair: int, rater: str, rewards: tuple[float | None, float | None]) -> None:
        """Tells an opinion as an event."""
        first, second = rewards
        known = None if first is None or second is None else (first, second)
        self._talk.stream.tell(Feedback(epoch=self.status["epoch"], pair=pair, rater=rater, rewards=known, round=name))

    # files

    def image_file(self, image: str) -> Path | None:
        """The file of an image, None where there is none; an id is 32 hexadecimal digits and nothing else."""
        if not _IMAGE_ID.fullmatch(image):
            return None
        candidates = [self.folder / SERVE_FOLDER / kind / f"{image}.png" for kind in ("images", "generated")]
        return next((path for path in candidates if path.is_file()), None)
