"""What a person reads in the terminal: whole lines, from rank 0 only, and never a raw control character."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO

from fdfo_engine.runtime.masking import masked

_hearers: list[Callable[[str], None]] = []


def visible(text: str) -> str:
    """`text` on one line, with control and other unprintable characters (ANSI escapes, newlines) shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def shown(text: str) -> str:
    """`text` as a terminal gets it: without secrets of the environment, control characters but line ends escaped."""
    return "".join(c if c in "\n\t" or _is_harmless(c) else visible(c) for c in masked(text))


def _is_harmless(character: str) -> bool:
    """What draws something, or only joins and spaces it: not what moves the cursor or turns the order of letters."""
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def say(line: str) -> None:
    """Writes one line to stdout, on rank 0 only."""
    _write(sys.stdout, line)


def warn(line: str, *, like: str | None = None, everywhere: bool = False) -> None:
    """Writes `warning: <line>` to stderr, on rank 0 only, or `everywhere` with the rank's number in front.

    Within `equal_warnings_counted` a warning is written if it is the first with its text, or with the same `like`.
    """
    if _repeats.is_first(like or line, line):
        _warn_now(line, everywhere=everywhere)


@contextmanager
def equal_warnings_counted() -> Iterator[None]:
    """Within it, in all threads, only the first of equal warnings is written; at its end, how many followed.

    Entered again within, it changes nothing: the outermost one counts.
    """
    _repeats.enter()
    try:
        yield
    finally:
        for line, count in _repeats.leave():
            _warn_now(f"{count} more like this: {line}", everywhere=False)


class _Repeats:
    """The warnings since counting began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._first_lines: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def is_first(self, key: str, line: str) -> bool:
        with self._lock:
            if not self._depth:
                return True
            self._first_lines.setdefault(key, line)
            self._counts[key] = self._counts.get(key, 0) + 1
            return self._counts[key] == 1

    def enter(self) -> None:
        with self._lock:
            self._depth += 1

    def leave(self) -> list[tuple[str, int]]:
        """First lines and how many followed, of those that had followers, where the outermost is left."""
        with self._lock:
            self._depth -= 1
            if self._depth:
                return []
            followed = [(self._first_lines[key], count - 1) for key, count in self._counts.items() if count > 1]
            self._first_lines, self._counts = {}, {}
            return followed


_repeats = _Repeats()


def _warn_now(line: str, *, everywhere: bool) -> None:
    complain(f"warning: {line}", everywhere=everywhere)
    if is_printing_rank():
        for hearer in list(_hearers):
            hearer(masked(line))


@contextmanager
def warnings_heard(hearer: Callable[[str], None]) -> Iterator[None]:
    """Within it `hearer` gets the line of every warning of this process, on rank 0, from the thread that warns."""
    _hearers.append(hearer)
    try:
        yield
    finally:
        _hearers.remove(hearer)


def complain(block: str, *, everywhere: bool = False) -> None:
    """Writes a block of lines to stderr, on rank 0 only, or `everywhere` with the rank's number in front."""
    if everywhere and not is_printing_rank():
        _print(sys.stderr, shown(f"rank {os.environ['RANK']}: {block}"))
    _write(sys.stderr, block)


def is_printing_rank() -> bool:
    """Whether this process is rank 0 by the launcher's environment; true before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def _write(stream: TextIO, text: str) -> None:
    if is_printing_rank():
        with _bars_aside():
            _print(stream, shown(text))


def _print(stream: TextIO, text: str) -> None:
    """What is told must not end what it tells of. Characters that the terminal does not know are shown as escapes.

    Where the reader has gone, the disk behind a log is full or the stream is closed, the line is lost to the terminal;
    the run's own files have what counts, and a command that is done flushes its output once more and says so.
    """
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        known = text.encode(stream.encoding, "backslashreplace").decode(stream.encoding)
        _print(stream, known)
    except (OSError, ValueError):
        return


def _bars_aside() -> AbstractContextManager[Any]:
    """Takes progress bars off the screen meanwhile; where nobody has imported their library there are none."""
    library = sys.modules.get("tqdm")
    return contextlib.nullcontext() if library is None else library.tqdm.external_write_mode()
