"""The page's own small application: its files, its session, and what its scripts ask for."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fdfo_engine.label.access import PageAccess, Passes, Session
from fdfo_engine.label.conductor import Conductor
from fdfo_engine.label.desk import Desk
from fdfo_engine.label.link import EngineLink
from fdfo_engine.label.messages import Entry, Label, NewRater, Nothing, Train, Undo
from fdfo_engine.serve.problems import Problem, invalid

FOLDER = Path(__file__).parent
_MEDIA = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_MAX_BODY_BYTES = 1 << 14
_IMAGE = re.compile("[0-9a-f]{32}")
_PNG_BEGIN, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_COOKIE_AGE_S = 180 * 24 * 3600
KEYS = (
    ("←  →", "choose the left or the right image"),
    ("↓  or space", "no preference"),
    ("F, held", "flip: see the other image in the same place"),
    ("Z", "zoom both images; the pointer or the arrow keys with Shift move them in step"),
    ("V", "side by side, or one place to flip in"),
    ("Backspace", "undo, as often as you like until the round trains"),
    ("S", "skip: no opinion"),
    ("Enter", "train, when the round is answered"),
    ("?", "this list"),
)
M = TypeVar("M", bound=BaseModel)
Handler = Callable[[Request], Awaitable[Response]]


class Page:
    """The application for one run. `hosts` are the names it answers to."""

    def __init__(self, link: EngineLink, passes: Passes, hosts: Iterable[str]) -> None:
        self._link, self._passes, self._hosts = link, passes, list(hosts)
        self.conductor = Conductor(link)
        self._desk = Desk(link, self.conductor)
        self._files = {path.name: path for path in (FOLDER / "static").iterdir() if path.suffix in _MEDIA}
        loader = FileSystemLoader(FOLDER)
        self._templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)

    def application(self) -> Starlette:
        """The Starlette application."""
        routes = [
            Route("/", _guarded(self._index)),
            Route("/static/{name}", _guarded(self._static)),
            Route("/img/{image}", _guarded(self._image)),
            Route("/api/session", _guarded(self._enter), methods=["POST"]),
            Route("/api/state", _guarded(self._state)),
            Route("/api/round", _guarded(self._round)),
            *(
                Route(f"/api/{name}", _guarded(handler), methods=["POST"])
                for name, handler in (
                    ("label", self._label), ("undo", self._undo), ("train", self._train), ("compare", self._compare),
                    ("next", self._next), ("again", self._again), ("link", self._new_link),
                )
            ),
        ]  # fmt: skip
        return Starlette(
            routes=routes,
            middleware=[Middleware(PageAccess, passes=self._passes, hosts=self._hosts)],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _answer_http, Exception: _answer_bug},
        )

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        conducting = asyncio.create_task(self.conductor.conduct())
        conducting.add_done_callback(_end_with_it)
        yield
        conducting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await conducting
        await self._link.close()

    # files

    async def _index(self, _request: Request) -> Response:
        text = self._templates.get_template("page.html").render(keys=KEYS)
        return Response(text, media_type="text/html", headers={"Cache-Control": "no-store"})

    async def _static(self, request: Request) -> Response:
        path = self._files.get(request.path_params["name"])
        if path is None:
            raise Problem(404, "not_found", "there is no such file")
        return Response(path.read_bytes(), media_type=_MEDIA[path.suffix], headers={"Cache-Control": "no-cache"})

    async def _image(self, request: Request) -> Response:
        _session(request)
        name = request.path_params["image"]
        if not _IMAGE.fullmatch(name):
            raise Problem(404, "no_image", "there is no such image")
        content = await self._link.image(name)
        if not (content.startswith(_PNG_BEGIN) and content.endswith(_PNG_END)):
            raise Problem(410, "image_gone", f"image {name}: its file is damaged")
        return Response(content, media_type="image/png", headers={"Cache-Control": "private, max-age=86400, immutable"})

    # who

    async def _enter(self, request: Request) -> Response:
        """The word of a link for a cookie that scripts cannot read."""
        word = (await _body(request, Entry)).word
        if self._passes.session(word) is None:
            raise Problem(401, "link", "this link is not valid here; ask its owner for a new one")
        response = Response(status_code=204)
        response.set_cookie(
            self._passes.cookie, word, max_age=_COOKIE_AGE_S, httponly=True, samesite="strict", path="/"
        )
        return response

    async def _new_link(self, request: Request) -> Response:
        """A link for one more rater."""
        _owner(request)
        word = self._passes.word(Session((await _body(request, NewRater)).name, "rater"))
        return _answer({"link": f"{request.base_url}#{word}"})

    # what the scripts ask for

    async def _state(self, request: Request) -> Response:
        return _answer(await self._desk.state(_session(request)))

    async def _round(self, request: Request) -> Response:
        return _answer(await self._desk.round(_session(request)))

    async def _label(self, request: Request) -> Response:
        return _answer(await self._desk.label(_session(request), await _body(request, Label)))

    async def _undo(self, request: Request) -> Response:
        return _answer(await self._desk.undo(_session(request), await _body(request, Undo)))

    async def _train(self, request: Request) -> Response:
        _owner(request)
        await self.conductor.train((await _body(request, Train)).round)
        return _answer({})

    async def _compare(self, request: Request) -> Response:
        return await self._asked(request, self.conductor.compare)

    async def _next(self, request: Request) -> Response:
        return await self._asked(request, self.conductor.go_on)

    async def _again(self, request: Request) -> Response:
        return await self._asked(request, self.conductor.try_again)

    async def _asked(self, request: Request, act: Callable[[], Awaitable[None]]) -> Response:
        _owner(request)
        await _body(request, Nothing)
        await act()
        return _answer({})


def _end_with_it(conducting: asyncio.Task[None]) -> None:
    """A bug of ours in the conductor ends the page, with its traceback: nothing would go on any more."""
    if not conducting.cancelled() and (error := conducting.exception()) is not None:
        traceback.print_exception(error)
        signal.raise_signal(signal.SIGTERM)


def _session(request: Request) -> Session:
    session: Session | None = request.state.session
    if session is None:
        raise Problem(401, "session", "open the page by its link", fix="it was printed where the page was started")
    return session


def _owner(request: Request) -> None:
    if not _session(request).is_owner:
        raise Problem(403, "owner", "only the owner of the run may do this")


async def _body(request: Request, kind: type[M]) -> M:
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise Problem(415, "media_type", "takes application/json")
    parts, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > _MAX_BODY_BYTES:
            raise Problem(413, "too_large", f"the body has more than {_MAX_BODY_BYTES} bytes")
        parts.append(chunk)
    try:
        return kind.model_validate_json(b"".join(parts))
    except ValidationError as error:
        raise invalid(error) from error


def _answer(content: dict[str, Any]) -> Response:
    return JSONResponse(content, headers={"Cache-Control": "no-store"})


def _guarded(handler: Handler) -> Handler:
    async def respond(request: Request) -> Response:
        try:
            return await handler(request)
        except Problem as problem:
            return problem.response()
        except ClientDisconnect:
            return Response(status_code=400)

    return respond


async def _answer_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Problem(error.status_code, "not_found" if error.status_code == 404 else "http", str(error.detail)).response()


async def _answer_bug(_request: Request, error: Exception) -> Response:
    traceback.print_exception(error)
    return Problem(500, "bug", f"{type(error).__name__}; the page's log has the details").response()
