"""Primitives: a training loop of one's own, in the order of `seq`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from fdfo_engine.serve.endpoints import Call, Endpoint, Handler, answer
from fdfo_engine.serve.messages import (
    ComputeReward,
    Forward,
    ForwardBackward,
    LoadState,
    OperationBody,
    OptimStep,
    Primitive,
    Sample,
    SaveState,
    Snapshot,
)

MAX_WAIT_S = 60.0
_BODIES: dict[str, type[Primitive]] = {
    "sample": Sample,
    "compute_reward": ComputeReward,
    "forward": Forward,
    "forward_backward": ForwardBackward,
    "optim_step": OptimStep,
    "snapshot": Snapshot,
    "save_state": SaveState,
    "load_state": LoadState,
}


class WaitQuery(BaseModel):
    """How long the answer may take."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    wait: Annotated[float, Field(ge=0, le=MAX_WAIT_S)] = 0.0
    """Seconds to wait for the end of the operation."""


def _primitive(kind: str) -> Handler:
    async def handler(call: Call) -> Response:
        body = call.body.model_dump(mode="json", exclude_none=True)
        name = body.get("round")
        if name is not None:
            await run_in_threadpool(call.backend.round, name)
        operation = await call.backend.submit_in_order(kind, body, call.key)
        if call.query.wait:
            operation = await call.backend.wait_for(operation.id, call.query.wait)
        return answer(OperationBody.of(operation), 200 if operation.is_over else 202)

    return handler


async def operation(call: Call) -> Response:
    """An operation; `wait` holds the answer back until it is over."""
    return answer(OperationBody.of(await call.backend.wait_for(call.number("id"), call.query.wait)))


ENDPOINTS = (
    *(
        Endpoint(
            "POST", f"/v1/{kind}", (body.__doc__ or "").splitlines()[0], _primitive(kind),
            {200: OperationBody, 202: OperationBody}, body=body, query=WaitQuery, creates=True,
            problems=(404, 409, 422, 429),
        )
        for kind, body in _BODIES.items()
    ),
    Endpoint(
        "GET", "/v1/operations/{id}", "An operation, with `wait` once it is over.", operation, {200: OperationBody},
        query=WaitQuery, problems=(404,),
    ),
)  # fmt: skip
