"""Keeps a run going between a person's rounds. What it asks for has a key of its own: asked twice, it is done once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Literal

from fdfo_engine.config import LabelsConfig
from fdfo_engine.label.link import EngineLink, Json
from fdfo_engine.label.strip import Strip
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.serve.problems import Problem

Activity = Literal["starting", "away", "sampling", "labelling", "training", "comparing"]
_LOOK_S = 0.4
_IDLE_S = 2.0


class Conductor:
    """Samples a round when there is none to label, trains the sealed one, and draws the strip.

    Everything follows from what the server holds, so a page that was killed goes on where it was.

    Attributes:
        labels: how a person is asked. rounds: the server's, oldest first. run: where the run is.
        strip: images over the rounds. problem: why the last thing asked for failed; None while all is well.
    """

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self.labels: LabelsConfig | None = None
        self.rounds: list[Json] = []
        self.run: Json = {}
        self.strip: Strip | None = None
        self.problem: Problem | None = None
        self._attempts: dict[str, int] = {}
        self._failed: set[str] = set()
        self._left: set[str] = set()
        self._comparing: str | None = None
        self._wake = asyncio.Event()

    async def conduct(self) -> None:
        """For ever."""
        drawing: asyncio.Task[None] | None = None
        while True:
            self._wake.clear()
            try:
                await self.look()
                await self._advance()
                self.problem = None
            except Problem as problem:
                self.problem = problem
            if drawing is None or drawing.done():
                drawing = asyncio.create_task(self._draw_strip())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _IDLE_S if self.activity == "labelling" else _LOOK_S)

    async def look(self) -> None:
        """Reads where the run is.

        Raises:
            Problem: the engine is away.
        """
        if self.labels is None:
            settings = (await self._link.get("/v1/run/config"))["settings"]
            self.labels = LabelsConfig.model_validate(settings["labels"])
            self.strip = Strip(self._link, self.labels.strip)
        self.run = await self._link.get("/v1/run")
        self.rounds = (await self._link.get("/v1/rounds"))["rounds"]

    # what is asked for

    async def train(self, name: str) -> None:
        """Seals round `name` and trains on it.

        Raises:
            Problem: it has no labels, is sealed already, or the engine is away.
        """
        await self._link.post(f"/v1/rounds/{name}/train", {}, self._key(f"train-{name}"))
        await self._soon()

    async def compare(self) -> None:
        """Begins the blind comparison of the untrained model with the trained one; the next look asks for it."""
        self._comparing = f"compare-{self.run['epoch']}-{len(self.rounds)}"
        await self._soon()

    async def go_on(self) -> None:
        """Leaves a comparison, or a round that cannot be trained on: the next round that trains."""
        if self.current is not None and (self.current["kind"] == "comparison" or self.problem is not None):
            self._left.add(self.current["id"])
        await self._soon()

    async def try_again(self) -> None:
        """Asks for what has failed once more."""
        for name in self._failed:
            self._attempts[name] = self._attempts.get(name, 0) + 1
        self._failed.clear()
        await self._soon()

    async def _soon(self) -> None:
        with contextlib.suppress(Problem):  # told by the next look
            await self.look()
        self._wake.set()

    # where it is

    @property
    def training_rounds(self) -> list[Json]:
        """Those that train, oldest first."""
        return [row for row in self.rounds if row["kind"] == "training"]

    @property
    def current(self) -> Json | None:
        """The round that people look at: a comparison until it is left, else the last one that trains."""
        newest = [*self.training_rounds[-1:], *(row for row in self.rounds[-1:] if row["kind"] == "comparison")]
        return next((row for row in reversed(newest) if row["id"] not in self._left), None)

    @property
    def activity(self) -> Activity:
        """What goes on."""
        if self.problem is not None and self.problem.body.code == "engine_away":
            return "away"
        if not self.run:
            return "starting"
        if self._comparing is not None:
            return "comparing"
        if self.current is None or self.current["state"] == "trained":
            return "sampling"
        return "labelling" if self.current["state"] == "open" else "training"

    async def _advance(self) -> None:
        assert self.labels is not None
        labels = self.labels
        if self._comparing is not None:
            if await self._is_done("/v1/comparisons", {"count": labels.comparison}, self._comparing):
                self._comparing = None
        elif self.activity == "sampling":
            wanted = {"count": labels.round_size, "keep": labels.keep.model_dump()}
            await self._is_done("/v1/rounds", wanted, f"round-{len(self.training_rounds)}")
        elif self.activity == "training":
            assert self.current is not None
            await self._is_done(f"/v1/rounds/{self.current['id']}/train", {}, f"train-{self.current['id']}")

    async def _is_done(self, path: str, body: Mapping[str, Any], name: str) -> bool:
        """Asks for a long thing, or for how it is going; a failed one is asked for again once somebody wants that.

        Raises:
            Problem: it has failed, or was refused.
        """
        operation = await self._link.post(path, body, self._key(name))
        if operation["state"] == "failed":
            self._failed.add(name)
            told = operation["problem"]
            raise Problem(int(told["status"]), str(told["code"]), str(told["detail"]), fix=told.get("fix"))
        return bool(operation["state"] == "done")

    def _key(self, name: str) -> str:
        return f"label-{name}-{self._attempts.get(name, 0)}"

    async def _draw_strip(self) -> None:
        """Draws what is lacking at the epoch that has just ended; a failure costs these pictures alone."""
        if self.strip is None or not self.training_rounds or not self.strip.lacks(epoch := int(self.run["epoch"])):
            return
        with contextlib.suppress(Problem, CheckpointError):
            pairs = (await self._link.get(f"/v1/rounds/{self.training_rounds[0]['id']}/pairs"))["pairs"]
            await self.strip.draw(epoch, list(dict.fromkeys(pair["prompt"] for pair in pairs)))
