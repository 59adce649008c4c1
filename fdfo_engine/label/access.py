"""Who may open the page: links of raters, their session cookies, and what a browser may send from where."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fdfo_engine.serve.access import cookie_of, without_port
from fdfo_engine.serve.problems import Problem

Role = Literal["owner", "rater"]
RATER = re.compile(r"[A-Za-z0-9_.@+-]{1,100}")
_PASS = re.compile(r"(owner|rater)~([A-Za-z0-9_.@+-]{1,100})~([A-Za-z0-9_-]{43})")
_SAFE_METHODS = ("GET", "HEAD")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_SECURITY_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Session:
    """Who asks: the owner, who also trains, or a rater, who only judges."""

    rater: str
    role: Role

    @property
    def is_owner(self) -> bool:
        """Whether this person may train, compare and go on."""
        return self.role == "owner"


class Passes:
    """Makes and knows the word that lets a person in; it stays valid over restarts, since it follows from a secret."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self.cookie = f"fdfo_label_{hashlib.sha256(self._secret).hexdigest()[:8]}"  # two runs on one host do not clash

    def word(self, session: Session) -> str:
        """What the person's link bears behind its #, and then the cookie."""
        return f"{session.role}~{session.rater}~{self._seal(session)}"

    def session(self, word: str) -> Session | None:
        """Whose word it is; None where it is nobody's."""
        found = _PASS.fullmatch(word)
        if found is None:
            return None
        session = Session(found[2], "owner" if found[1] == "owner" else "rater")
        return session if hmac.compare_digest(found[3], self._seal(session)) else None

    def _seal(self, session: Session) -> str:
        text = f"label page\n{session.role}\n{session.rater}".encode()
        digest = hmac.new(self._secret, text, hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


class PageAccess:
    """Plain ASGI: refuses other hosts and other sites' pages, finds the session, and adds the security headers."""

    def __init__(self, app: ASGIApp, *, passes: Passes, hosts: Iterable[str]) -> None:
        self._app, self._passes = app, passes
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_SECURITY_HEADERS)
            await send(message)

        problem = self._refusal(scope["method"], headers)
        if problem is not None:
            await problem.response()(scope, receive, send_guarded)
            return
        scope["state"] = {
            **scope.get("state", {}),
            "session": self._passes.session(cookie_of(headers, self._passes.cookie)),
        }
        await self._app(scope, receive, send_guarded)

    def _refusal(self, method: str, headers: Headers) -> Problem | None:
        host = headers.get("host", "").lower()
        if without_port(host) not in self._hosts:
            return Problem(403, "host", f"Host {host!r} is no name of this page")
        if method not in _SAFE_METHODS and not _is_own_page(headers, host):
            return Problem(403, "cross_site", "a page of another site asked")
        return None


def _is_own_page(headers: Headers, host: str) -> bool:
    """What changes something must say that it comes from this page: browsers do, other sites cannot."""
    site = headers.get("sec-fetch-site")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin.lower()).netloc != host:
        return False
    return site == "same-origin" if site is not None else origin is not None
