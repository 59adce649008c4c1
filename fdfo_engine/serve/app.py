"""The Starlette application: every face's endpoints behind the same door."""

from __future__ import annotations

import traceback
from collections.abc import Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fdfo_engine.serve.access import Access
from fdfo_engine.serve.backend import Backend
from fdfo_engine.serve.endpoints import Endpoint
from fdfo_engine.serve.faces import about, events, images, primitives, rounds, run
from fdfo_engine.serve.openapi import description
from fdfo_engine.serve.problems import Problem

ENDPOINTS: tuple[Endpoint, ...] = (
    *about.ENDPOINTS,
    *run.ENDPOINTS,
    *events.ENDPOINTS,
    *rounds.ENDPOINTS,
    *primitives.ENDPOINTS,
    *images.ENDPOINTS,
)
_OPENAPI_PATH = "/v1/openapi.json"
_CODES = {404: "not_found", 405: "method_not_allowed"}


def application(backend: Backend, *, hosts: Iterable[str], origins: Iterable[str] = ()) -> Starlette:
    """The application for `backend`; `hosts` are the names it answers to."""

    document = description(ENDPOINTS)

    async def openapi(_request: Request) -> Response:
        return JSONResponse(document)

    open_paths = [endpoint.path for endpoint in ENDPOINTS if endpoint.is_open]
    access = Middleware(Access, token=backend.token, hosts=hosts, origins=origins, open_paths=open_paths)
    return Starlette(
        routes=[*(endpoint.route(backend) for endpoint in ENDPOINTS), Route(_OPENAPI_PATH, openapi)],
        middleware=[access],
        exception_handlers={HTTPException: _answer_http, Exception: _answer_bug},
    )


async def _answer_http(_request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or not this method."""
    assert isinstance(error, HTTPException)
    response = Problem(error.status_code, _CODES.get(error.status_code, "http"), str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _answer_bug(_request: Request, error: Exception) -> Response:
    traceback.print_exception(error)
    return Problem(500, "bug", f"{type(error).__name__}; the server's log has the details").response()
