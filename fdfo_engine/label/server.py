"""The page's process: its own port, and where nobody serves the run yet, an engine of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from fdfo_engine.label.access import Passes, Session
from fdfo_engine.label.link import EngineLink
from fdfo_engine.label.page import Page
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.durable import replace_file
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError
from fdfo_engine.runtime.json_text import json_object
from fdfo_engine.runtime.process import is_alive
from fdfo_engine.runtime.run_lock import LOCK_NAME
from fdfo_engine.serve.access import TOKEN_NAME
from fdfo_engine.serve.address import Address

PAGE_NAME = "label.json"
DEFAULT_PORT = 8720
_STOP_TIMEOUT_S = 120.0
_TOKEN_TIMEOUT_S = 180.0
_PREDECESSOR_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class PageDoor(Address):
    """Where the page listens, and who opens it.

    Attributes:
        owner: the name under which the owner's answers are kept. raters: names that get a link at the start.
        opens_browser: whether the owner's link is opened.
    """

    port: int = DEFAULT_PORT
    owner: str = "owner"
    raters: Sequence[str] = ()
    opens_browser: bool = True

    def check(self) -> None:
        """Refuses what would open the page to strangers unasked, and names that cannot stand in a link.

        Raises:
            UsageError: with what to use instead.
        """
        self.require_allowed()
        for name in (self.owner, *self.raters):
            if Passes("").session(Passes("").word(Session(name, "rater"))) is None:
                raise UsageError(f"rater {name!r}: takes letters, digits and _ . @ + -, at most 100")


def open_page(folder: Path, door: PageDoor) -> int:
    """Serves the page of the run in `folder` until a signal; returns 0. The engine is served by somebody already."""
    door.check()
    link = EngineLink(folder)
    passes = Passes(_token(folder))
    page = Page(link, passes, door.names)
    with door.bound() as listener:
        url = door.url(listener.getsockname()[1])
        _tell(url, passes, door)
        replace_file(folder / PAGE_NAME, json.dumps({"url": url, "pid": os.getpid()}).encode())
        settings = uvicorn.Config(
            page.application(), log_level="warning", access_log=False, server_header=False,
            timeout_graceful_shutdown=2, limit_concurrency=256,
        )  # fmt: skip
        try:
            _Server(settings).run(sockets=[listener])
        finally:
            (folder / PAGE_NAME).unlink(missing_ok=True)
    return 0


class _Server(uvicorn.Server):
    """Ends at a signal without raising it again: what was opened around it is closed in order."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM, while it serves."""
        previous = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _tell(url: str, passes: Passes, door: PageDoor) -> None:
    """Prints the links, and opens the owner's."""
    owner = f"{url}/#{passes.word(Session(door.owner, 'owner'))}"
    say(f"label page: {owner}")
    for name in door.raters:
        say(f"for {name}: {url}/#{passes.word(Session(name, 'rater'))}")
    if not door.is_loopback:
        port = int(url.rsplit(":", 1)[1])
        say(f"reachable from other machines, unencrypted; from there rather: {door.tunnel(port)}")
    if door.opens_browser:
        threading.Thread(target=webbrowser.open, args=(owner,), daemon=True).start()


def _token(folder: Path) -> str:
    """The server's token, once it has made one."""
    deadline = time.monotonic() + _TOKEN_TIMEOUT_S
    path = folder / TOKEN_NAME
    while not (path.is_file() and len(path.read_text().strip()) >= 16):
        if time.monotonic() > deadline:
            raise EnvironmentProblem(f"{folder}: nobody serves this run; fdfo serve, or fdfo label --config C")
        time.sleep(0.1)
    return path.read_text().strip()


def _wait_for_predecessor(folder: Path) -> None:
    """An engine whose page was killed ends by itself, between two parts of its work; one that stays will be refused."""
    try:
        holder = int(json_object((folder / LOCK_NAME).read_bytes())["pid"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return
    deadline = time.monotonic() + _PREDECESSOR_TIMEOUT_S
    while is_alive(holder) and time.monotonic() < deadline:
        time.sleep(0.2)


class OwnEngine:
    """`fdfo serve` in a process of its own, as long as the context lasts; started again where a signal killed it."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        """`command` serves the run of `folder`."""
        self._command = list(command)
        _wait_for_predecessor(folder)
        self._is_closing = False
        self._process = self._started()
        self._watch = threading.Thread(target=self._keep_alive, daemon=True)
        self.exit_code: int | None = None

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, start_new_session=True)  # a Ctrl-C is the page's, which then ends both

    def __enter__(self) -> OwnEngine:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing = True
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(_STOP_TIMEOUT_S)

    def _keep_alive(self) -> None:
        while True:
            code = self._process.wait()
            if self._is_closing:
                return
            if code >= 0:
                self.exit_code = code
                os.kill(os.getpid(), signal.SIGTERM)  # the page has nothing to show any more
                return
            say(f"the engine was killed by {signal.Signals(-code).name}; it is started again")
            self._process = self._started()
