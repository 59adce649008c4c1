"""The page's side of the conversation with `fdfo serve`: found anew whenever the server was started again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from fdfo_engine.runtime.json_text import json_object
from fdfo_engine.serve.access import TOKEN_NAME
from fdfo_engine.serve.address import ADDRESS_NAME
from fdfo_engine.serve.problems import Problem

Json = dict[str, Any]
_TIMEOUT_S = 20.0


class EngineLink:
    """Requests to the server of a run folder. What it refuses, and that it is away, is raised as a `Problem`."""

    def __init__(self, folder: Path, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.folder = folder
        self._http = httpx.AsyncClient(timeout=_TIMEOUT_S, transport=transport)

    async def close(self) -> None:
        """Ends its connections."""
        await self._http.aclose()

    @property
    def token(self) -> str:
        """The server's token.

        Raises:
            Problem: no server was ever started on the folder.
        """
        try:
            return (self.folder / TOKEN_NAME).read_text().strip()
        except OSError as error:
            raise _away() from error

    async def get(self, path: str, query: Mapping[str, Any] | None = None) -> Json:
        """The JSON of an answer."""
        return _json(await self._ask("GET", path, params=query))

    async def post(
        self, path: str, body: Mapping[str, Any], key: str | None = None, wait_s: float = _TIMEOUT_S
    ) -> Json:
        """As `get`; the same `key` asks for the same thing, however often it is sent."""
        headers = {} if key is None else {"Idempotency-Key": key}
        return _json(await self._ask("POST", path, json=dict(body), headers=headers, timeout=wait_s))

    async def delete(self, path: str) -> Json:
        """As `get`."""
        return _json(await self._ask("DELETE", path))

    async def image(self, image: str) -> bytes:
        """A PNG file."""
        return (await self._ask("GET", f"/v1/images/{image}/content")).content

    async def _ask(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **options: Any
    ) -> httpx.Response:
        bearer = {"Authorization": f"Bearer {self.token}"}
        try:
            url = json_object((self.folder / ADDRESS_NAME).read_bytes())["url"]
            response = await self._http.request(method, url + path, headers={**bearer, **(headers or {})}, **options)
        except (OSError, ValueError, KeyError, httpx.TransportError) as error:
            raise _away() from error
        if not response.is_success:
            raise _refused(response)
        return response


def _json(response: httpx.Response) -> Json:
    """The body; where it is none of ours, something else listens at the address now."""
    try:
        answer = response.json()
    except ValueError as error:
        raise _away() from error
    if not isinstance(answer, dict):
        raise _away()
    return answer


def _away() -> Problem:
    return Problem(503, "engine_away", "the engine does not answer, nothing was recorded; it may be starting again")


def _refused(response: httpx.Response) -> Problem:
    """The server's own words."""
    try:
        body = response.json()
        told = body.get("error", body)
        code, detail = str(told["code"]), str(told.get("detail") or told.get("message"))
    except (ValueError, KeyError, AttributeError):
        code, detail = "engine", f"the engine answered {response.status_code}"
    return Problem(response.status_code, code, detail)
