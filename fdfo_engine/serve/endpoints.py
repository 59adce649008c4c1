"""How an endpoint is declared: once, for the router, for checking its requests, and for the OpenAPI description."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fdfo_engine.runtime.durable import plain_json
from fdfo_engine.runtime.errors import FdfoError
from fdfo_engine.runtime.json_text import json_value
from fdfo_engine.serve.problems import Problem, invalid, problem_of

if TYPE_CHECKING:
    from fdfo_engine.serve.backend import Backend

MAX_BODY_BYTES = 1 << 22
MAX_KEY_LENGTH = 200
Answers = Mapping[int, type[BaseModel] | str | None]
"""By status: a model, the media type of something else, or None for no body."""


@dataclass(frozen=True)
class Call:
    """One checked request."""

    backend: Backend
    request: Request
    body: Any
    query: Any

    @property
    def key(self) -> str | None:
        """The Idempotency-Key."""
        key = self.request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
            raise Problem(400, "bad_key", f"Idempotency-Key: takes 1 to {MAX_KEY_LENGTH} characters")
        return key

    def path(self, name: str) -> str:
        """A part of the path."""
        return str(self.request.path_params[name])

    def number(self, name: str) -> int:
        """A part of the path that is a number."""
        text = self.path(name)
        if not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise Problem(404, "not_found", f"{name} {text!r}: takes a number")
        return int(text)


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """One method of one path.

    Attributes:
        problems: statuses it may answer as `application/problem+json`, besides those that every endpoint may.
        is_open: whether it needs no token.
        creates: whether it takes an Idempotency-Key.
        speaks_openai: whether its errors have OpenAI's shape.
    """

    method: str
    path: str
    summary: str
    handler: Handler
    answers: Answers
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    problems: tuple[int, ...] = ()
    is_open: bool = False
    creates: bool = False
    speaks_openai: bool = False
    tags: tuple[str, ...] = field(default=())

    def route(self, backend: Backend) -> Route:
        """The route of it."""

        async def respond(request: Request) -> Response:
            try:
                return await self.handler(await self._checked(backend, request))
            except (Problem, FdfoError) as error:
                problem = problem_of(error)
                return openai_error(problem) if self.speaks_openai else problem.response()

        return Route(self.path, respond, methods=[self.method], name=f"{self.method} {self.path}")

    async def _checked(self, backend: Backend, request: Request) -> Call:
        query = None
        if self.query is not None:
            query = _validated(self.query.model_validate, dict(request.query_params))
        body = None
        if self.body is not None:
            raw = await _raw_body(request)
            body = _validated(self.body.model_validate_json, raw or b"{}")
        return Call(backend, request, body, query)


def _validated(validate: Callable[[Any], BaseModel], raw: Any) -> BaseModel:
    try:
        return validate(raw)
    except ValidationError as error:
        raise invalid(error) from error


async def _raw_body(request: Request) -> bytes:
    """The body, if it is JSON and not too large."""
    parts, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise Problem(413, "too_large", f"the body has more than {MAX_BODY_BYTES} bytes")
            parts.append(chunk)
    except ClientDisconnect as error:
        raise Problem(400, "disconnected", "the client left before its request was whole") from error
    raw = b"".join(parts)
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if raw and media != "application/json":
        raise Problem(415, "media_type", f"content-type {media or 'missing'!r}: takes application/json")
    if raw:
        _require_json(raw)
    return raw


def _require_json(raw: bytes) -> None:
    try:
        json_value(raw, takes_nan=False)
    except ValueError as error:
        raise Problem(400, "not_json", f"the body is no JSON: {error}") from error


def answer(body: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`body` as JSON."""
    return JSONResponse(
        plain_json(body.model_dump(mode="json", exclude_none=True)), status, headers=dict(headers or {})
    )


def openai_error(problem: Problem) -> Response:
    """A problem in OpenAI's shape."""
    body, status = problem.body, problem.body.status
    kind = "invalid_request_error" if status < 500 else "server_error"
    param = body.errors[0].pointer.removeprefix("/") if body.errors else None
    content = {"error": {"message": body.detail, "type": kind, "param": param, "code": body.code}}
    headers = {"Retry-After": str(problem.retry_after_s)} if problem.retry_after_s is not None else {}
    return JSONResponse(content, status, headers=headers)
