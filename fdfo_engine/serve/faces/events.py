"""The events of the run: as a list, or as they come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from fdfo_engine.serve.backend import Backend
from fdfo_engine.serve.endpoints import Call, Endpoint, answer
from fdfo_engine.serve.messages import MAX_INTEGER, EventsBody
from fdfo_engine.serve.problems import Problem

STREAM = "text/event-stream"
KEEP_ALIVE_S = 15.0
_LOOK_S = 0.25
_BATCH = 256


class EventsQuery(BaseModel):
    """Where to begin."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    after: Annotated[int, Field(ge=0, le=MAX_INTEGER)] = 0
    """The number of the last event that is known; 0 begins with the first."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    """Of a list: at most so many."""


async def events(call: Call) -> Response:
    """A list; or with `Accept: text/event-stream` server-sent events, whose id is the event's number."""
    accepts = call.request.headers.get("accept", "")
    if STREAM in accepts:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(call.backend, _begin(call)), media_type=STREAM, headers=headers)
    lines = await run_in_threadpool(call.backend.feed.read, call.query.after, call.query.limit)
    last = lines[-1][0] if lines else min(call.query.after, call.backend.feed.last)
    return answer(EventsBody(events=[json.loads(line) for _, line in lines], last=last))


def _begin(call: Call) -> int:
    """A browser that reconnects says what it saw last."""
    seen = call.request.headers.get("last-event-id")
    if seen is None:
        return int(call.query.after)
    if not (seen.isascii() and seen.isdecimal() and len(seen) < 17):
        raise Problem(400, "bad_event_id", f"Last-Event-ID {seen[:40]!r}: takes a number")
    return int(seen)


async def _stream(backend: Backend, after: int) -> AsyncIterator[str]:
    yield "retry: 1000\n\n"
    silent_s = 0.0
    while not backend.is_closing:
        lines = await run_in_threadpool(backend.feed.read, after, _BATCH)
        for number, line in lines:
            kind = json.loads(line)["type"]
            yield f"id: {number}\nevent: {kind}\ndata: {line}\n\n"
            after, silent_s = number, 0.0
        if lines:
            continue
        if silent_s >= KEEP_ALIVE_S:
            yield ": still here\n\n"
            silent_s = 0.0
        await backend.bell.until(lambda: None, _LOOK_S)
        silent_s += _LOOK_S


ENDPOINTS = (
    Endpoint(
        "GET", "/v1/events", "Events behind a number; with `Accept: text/event-stream` as they come.", events,
        {200: EventsBody}, query=EventsQuery, problems=(400,),
    ),
)  # fmt: skip
