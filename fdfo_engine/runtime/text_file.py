"""Text files that people bring: UTF-8, whatever ends their lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fdfo_engine.runtime.errors import PromptError

_MARK = "\ufeff"
_LINE_END = re.compile("\r\n|\n|\r")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file as it stands, line ends included; a byte order mark before it is no part of it.

    Raises:
        PromptError: it cannot be read, or is not UTF-8; names the line.
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith(_UTF16_MARKS):
            raise PromptError(f"{path}: not UTF-8 but UTF-16; save it as UTF-8") from error
        line = len(lines_of(content[: error.start].decode("latin-1") + "."))
        raise PromptError(f"{path}:{line}: not UTF-8: {error.reason} at byte {error.start} of the file") from error
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from error


def whole_lines(path: Path) -> Iterator[str]:
    r"""The lines of a UTF-8 file with their ends (\n, \r\n or \r), one after another: it may be larger than memory.

    Raises:
        PromptError: as `read_text`; after the lines before the one that is no UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except (UnicodeDecodeError, OSError):
        read_text(path)  # says which line it is
        raise


def lines_in(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file as `lines_of` gives them, one after another; raises as `whole_lines`."""
    return (_LINE_END.sub("", line).removeprefix(_MARK) for line in whole_lines(path))


def lines_of(text: str) -> list[str]:
    r"""The lines of a text, which end at \n, \r\n or \r only.

    `str.splitlines` also cuts at a form feed, at U+0085 and at U+2028, which captions from the web hold. A byte order
    mark that begins a line is left by a file that was appended to another, and is dropped.
    """
    lines = _LINE_END.split(text)
    if not lines[-1]:
        del lines[-1]
    return [line.removeprefix(_MARK) for line in lines]
