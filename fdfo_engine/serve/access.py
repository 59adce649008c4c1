"""Who may ask: the token, the Host and Origin of a request. Plain ASGI, so that event streams pass unbuffered."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fdfo_engine.runtime.durable import storage_error
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.serve.problems import Problem

TOKEN_NAME = "serve.token"
COOKIE = "fdfo_session"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def token_of(folder: Path) -> str:
    """The token of a run folder, made at the first call, in a file that only its owner reads.

    Raises:
        CheckpointError: the storage refuses, or others may read the file.
    """
    path = folder / TOKEN_NAME
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            raise CheckpointError(f"{path}: others may read it; delete it, or chmod 600") from None
        token = path.read_text().strip()
        if len(token) < 16:
            raise CheckpointError(f"{path}: holds no token; delete it, and a new one is made") from None
        return token
    except OSError as error:
        raise storage_error(path, error) from error
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
        file.flush()
        os.fsync(file.fileno())
    return token


class Access:
    """Lets through what bears the token, was asked of a name of this server, and comes from no other site's page."""

    def __init__(
        self, app: ASGIApp, *, token: str, hosts: Iterable[str], origins: Iterable[str], open_paths: Iterable[str]
    ) -> None:
        """`hosts` are names without a port; `origins` of other sites' pages that may ask; `open_paths` need no token"""
        self._app, self._token = app, token
        self._hosts = {host.lower() for host in hosts}
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        problem = self._refusal(scope, Headers(scope=scope))
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await problem.response()(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Problem | None:
        host = headers.get("host", "").lower()
        if without_port(host) not in self._hosts:
            return Problem(403, "host", f"Host {host!r} is no name of this server", fix="fdfo serve --allow-host NAME")
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin.lower(), host):
            return Problem(403, "origin", f"Origin {origin!r} may not ask", fix="fdfo serve --allow-origin ORIGIN")
        if scope["path"] in self._open_paths:
            return None
        return self._refusal_of_token(scope, headers)

    def _is_own(self, origin: str, host: str) -> bool:
        """`null`, as of a sandboxed frame or a file, is nobody's."""
        return origin in self._origins or (
            urlsplit(origin).netloc == host and origin.startswith(("http://", "https://"))
        )

    def _refusal_of_token(self, scope: Scope, headers: Headers) -> Problem | None:
        bearer = headers.get("authorization", "")
        if bearer.lower().startswith("bearer "):
            return None if self._matches(bearer[7:].strip()) else _no_token("the token is another one")
        if not self._matches(cookie_of(headers, COOKIE)):
            return _no_token("a request bears Authorization: Bearer TOKEN")
        site = headers.get("sec-fetch-site", "same-origin")
        if scope["method"] not in _SAFE_METHODS and site not in ("same-origin", "none"):
            return Problem(403, "cross_site", f"a page of another site asked ({site})")
        return None

    def _matches(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


def _no_token(detail: str) -> Problem:
    return Problem(401, "token", detail, fix=f"it lies in {TOKEN_NAME} of the run folder")


def without_port(host: str) -> str:
    """The name in a Host header."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def cookie_of(headers: Headers, name: str) -> str:
    """The cookie of that name; empty where there is none."""
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[name].value if name in cookies else ""
