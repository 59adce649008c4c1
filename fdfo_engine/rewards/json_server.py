"""Talks JSON with a reward server: bounded in time and size, patient with outages, strict about replies."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import urllib3
from pydantic import Field, field_validator
from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, wait_random_exponential

from fdfo_engine.config.section import Section, refuse
from fdfo_engine.runtime import pulse
from fdfo_engine.runtime.console import visible, warn
from fdfo_engine.runtime.errors import RewardError
from fdfo_engine.runtime.json_text import json_value

T = TypeVar("T")
R = TypeVar("R")

KEY_VARIABLE = "FDFO_REWARD_KEY"
"""Environment variable whose value goes out as a bearer token."""

READY_WITHIN_S = 10.0
_MAX_REPLY_BYTES = 4 << 20
_TRIES = 3  # of one request that fails while the server answers others, or with an internal error
_LONGEST_WAIT_S = 30.0
_SHOWN_CHARACTERS = 200
_MOST_DIGITS = 9  # of a pause in seconds: 30 years are as good as for ever
_PASSING = {408, 425, 429, 502, 503, 504}


class ServerOptions(Section):
    """Where a reward server is, and how long to wait for it."""

    url: str = Field(min_length=1)
    """http or https; redirects are not followed."""

    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that one request may take."""

    give_up_after_s: float = Field(default=600.0, ge=0)
    """Seconds without any answer after which the run stops, resumable; until then requests are repeated."""

    concurrency: int = Field(default=8, ge=1)
    """Requests under way at a time."""

    ask_first: bool = True
    """Asks about one drawn picture before the run begins, and stops it where the reply has no score."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and parts.hostname
        refuse([] if ok else [("", "takes http://host... or https://host...")])
        return url.rstrip("/")


class _ServerError(Exception):
    """A request without the answer it asked for.

    Attributes:
        reason: what was wrong, the same words for all replies that are wrong in this way. shown: what may differ.
    """

    def __init__(self, reason: str, shown: str = "") -> None:
        super().__init__(f"{reason}: {shown}" if shown else reason)
        self.reason, self.shown = reason, shown


class BadReplyError(_ServerError):
    """The server answered, but not with what was asked for: these images have no score."""


class NoOpinionError(BadReplyError):
    """A reply that would be the same again: it tells nothing about the image, or refuses the request (HTTP 4xx)."""


class _AwayError(_ServerError):
    """No answer, or one that says to come back later, after `retry_after_s` where it says so."""

    def __init__(self, reason: str, shown: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(reason, shown)
        self.retry_after_s = retry_after_s


class _BrokenError(_ServerError):
    """The server failed inside on this request."""


class JsonServer:
    """One server; its methods may be called from several threads."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._pool = urllib3.PoolManager(maxsize=options.concurrency)
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._last_answer = 0.0
        self._is_away = False

    def ask(self, path: str, payload: Any) -> Any:
        """The JSON reply to a POST of `payload`.

        Raises:
            BadReplyError: a reply that is no JSON, or an error about this request. It costs these images their score.
            RewardError: nothing was answered for `give_up_after_s`, or the server refuses this client.
        """
        started = time.monotonic()
        retrying = Retrying(
            retry=retry_if_exception_type((_AwayError, _BrokenError)),
            wait=_pause_s,
            stop=lambda state: self._has_waited_enough(state, started),
            before_sleep=self._tell_once,
            sleep=sleep_using_event(self._cancelled),
            reraise=True,
        )
        try:
            return retrying(self._once, "POST", path, payload, self.options.timeout_s)
        except _BrokenError as error:
            raise BadReplyError(error.reason, error.shown) from error
        except _AwayError as error:
            if self._answered_since(started):
                raise BadReplyError(error.reason, error.shown) from error
            raise RewardError(self._gone(path, f"{error}, for {self.options.give_up_after_s:g} s")) from error

    def cancel(self) -> None:
        """Ends all waiting: requests that would be repeated fail now. For a run that stops."""
        self._cancelled.set()

    def require_ready(self, method: str, path: str, payload: Any = None) -> Any:
        """The reply to one request, within ten seconds.

        Raises:
            RewardError: no answer, or not a good one: with a line to try by hand.
        """
        try:
            return self._once(method, path, payload, READY_WITHIN_S)
        except _ServerError as error:
            raise RewardError(self._gone(path, str(error))) from error

    def ask_first(self, path: str, payload: Any, read: Callable[[Any], object]) -> None:
        """Asks about one picture before a run, and reads the reply as it will be read then.

        Raises:
            RewardError: no answer within `timeout_s`, or one that `read` refuses: with a line to try by hand.
        """
        try:
            read(self._once("POST", path, payload, self.options.timeout_s))
        except _ServerError as error:
            reason = f"asked about a drawn picture (ask_first): {error}"
            raise RewardError(self._gone(path, reason)) from error

    def opinions(self, ask: Callable[[T], R], requests: Sequence[T], sizes: Sequence[int]) -> list[R | BadReplyError]:
        """`ask` of every request, twice where the reply is bad; the error where it still is.

        `sizes` are the images in each. Those without an opinion are told: a line a reason, with their number.
        """
        mended: list[tuple[BadReplyError, int]] = []
        answers = self.for_all(lambda row: _twice(ask, requests[row], sizes[row], mended), range(len(requests)))
        lost = [
            (answer, size) for answer, size in zip(answers, sizes, strict=True) if isinstance(answer, BadReplyError)
        ]
        self._tell_by_reason("no opinion on", lost)
        self._tell_by_reason("asked once more about", mended)
        return answers

    def _tell_by_reason(self, what: str, errors: Sequence[tuple[BadReplyError, int]]) -> None:
        for reason in dict.fromkeys(error.reason for error, _ in errors):
            alike = [(error, size) for error, size in errors if error.reason == reason]
            count = sum(size for _, size in alike)
            images = "one image" if count == 1 else f"{count} images"
            among = " (the first of them)" if len({error.shown for error, _ in alike}) > 1 else ""
            line = f"{self.options.url}: {what} {images}: {alike[0][0]}{among}"
            warn(line, like=f"{self.options.url}: {what}: {reason}")

    def for_all(self, ask: Callable[[T], R], requests: Sequence[T]) -> list[R]:
        """`ask` of every request, `concurrency` at a time, in order. The first `RewardError` ends it."""
        with ThreadPoolExecutor(self.options.concurrency, thread_name_prefix="reward") as pool:
            try:
                return list(pool.map(ask, requests))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _once(self, method: str, path: str, payload: Any, timeout_s: float) -> Any:
        pulse.got_on(timeout_s + self.options.give_up_after_s)
        deadline = time.monotonic() + timeout_s
        body = None if payload is None else json.dumps(payload, allow_nan=False).encode()
        try:
            reply = self._pool.request(
                method, self.options.url + path, body=body, headers=_headers(), preload_content=False,
                decode_content=False, redirect=False, retries=False,
                timeout=urllib3.Timeout(connect=min(timeout_s, READY_WITHIN_S), read=timeout_s),
            )  # fmt: skip
            try:
                content = _read(reply, deadline)
            finally:
                reply.close()
                reply.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _AwayError(_reason(error)) from error
        return self._judged(reply, content)

    def _judged(self, reply: urllib3.BaseHTTPResponse, content: bytes) -> Any:
        status, shown = reply.status, visible(content[:_SHOWN_CHARACTERS].decode("utf-8", "replace"))
        if status in _PASSING:
            raise _AwayError(f"HTTP {status}", shown, _retry_after_s(reply.headers.get("Retry-After")))
        with self._lock:
            self._last_answer, self._is_away = time.monotonic(), False
        if status >= 500:
            raise _BrokenError(f"HTTP {status}", shown)
        if status in (401, 403):
            raise RewardError(f"{self.options.url}: HTTP {status}: {shown}\nput the key in env {KEY_VARIABLE}")
        if 400 <= status < 500:
            raise NoOpinionError(f"HTTP {status}", shown)
        if status != 200:
            raise BadReplyError(f"HTTP {status}", shown)
        kind = reply.headers.get("Content-Type", "")
        if reply.headers.get("Content-Encoding", "identity") != "identity" or "json" not in kind:
            raise BadReplyError(f"takes plain application/json, got {kind or 'no type'}", shown)
        return _parsed(content, shown)

    def _has_waited_enough(self, state: RetryCallState, started: float) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if self._cancelled.is_set():
            return True
        if state.attempt_number >= _TRIES and (isinstance(error, _BrokenError) or self._answered_since(started)):
            return True
        pause = state.upcoming_sleep if isinstance(error, _AwayError) else 0.0
        return time.monotonic() - max(started, self._last_answer) + pause > self.options.give_up_after_s

    def _answered_since(self, started: float) -> bool:
        return self._last_answer > started

    def _tell_once(self, state: RetryCallState) -> None:
        """One line an outage, not one a retry."""
        error = state.outcome.exception() if state.outcome else None
        with self._lock:
            is_news, self._is_away = not self._is_away, True
        if is_news:
            warn(f"{self.options.url}: {error}; trying again for up to {self.options.give_up_after_s:g} s")

    def _gone(self, path: str, reason: str) -> str:
        return f"no use of the reward server {self.options.url}: {reason}\ntry: curl -sSi {self.options.url}{path}"


def _twice(ask: Callable[[T], R], request: T, size: int, mended: list[tuple[BadReplyError, int]]) -> R | BadReplyError:
    """The answer, or the second error; an error that a second request mended goes to `mended`."""
    try:
        return ask(request)
    except NoOpinionError as error:
        return error
    except BadReplyError as error:
        first = error
    try:
        answer = ask(request)
    except BadReplyError as error:
        return error
    mended.append((first, size))
    return answer


def _pause_s(state: RetryCallState) -> float:
    """Random and growing, and at least what the server asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked_for = error.retry_after_s if isinstance(error, _AwayError) else 0.0
    return max(wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT_S)(state), asked_for)


def _retry_after_s(header: str | None) -> float:
    """The seconds of a Retry-After header, given as a number or as a date; 0 where it says nothing readable."""
    text = (header or "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:_MOST_DIGITS])
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, moment.timestamp() - time.time())


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE)
    return {
        "Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity",
        **({"Authorization": f"Bearer {key}"} if key else {}),
    }  # fmt: skip


def _read(reply: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    """The body, unless it grows too large or drips in too slowly."""
    content = bytearray()
    while piece := reply.read1(1 << 16):
        content += piece
        if len(content) > _MAX_REPLY_BYTES:
            raise BadReplyError(f"a reply of more than {_MAX_REPLY_BYTES >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError("the reply takes longer than timeout_s")
    return bytes(content)


def _parsed(content: bytes, shown: str) -> Any:
    try:
        return json_value(content.decode("utf-8"), takes_nan=False)
    except ValueError as error:
        raise BadReplyError("no JSON", f"{error}: {shown}") from error


def _reason(error: Exception) -> str:
    inner = error.__cause__ or error
    text = visible(str(inner)).strip() or type(inner).__name__
    return text.rpartition(">: ")[2] or text
